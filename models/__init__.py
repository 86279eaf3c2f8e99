"""Networks, their weights, and prediction from Python (models/README.md)."""

from models.backbone import statistics_kept
from models.build import build_model, parameter_groups, released_dilations
from models.deeplab import DeepLabPBAL, upsample
from models.discriminator import PatchDiscriminator
from models.prediction import predict
from models.prototypes import Projection, classifier_prototypes
from models.weights import WeightError, WeightFile, load_model, load_weights, read_checkpoint, read_weights
