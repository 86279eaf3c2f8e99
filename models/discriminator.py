"""Output-space discriminator (Tsai et al. 2018, ADVENT), in the form and with the initial weights of PBAL's release."""

from __future__ import annotations

from torch import Tensor, nn

from models.initialization import as_pbal


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions of stride 2; says of each patch whether a softmax map is source (0) or target (1).

    Args:
        num_classes: K, channels of the input.
        width: channels of the first layer; 64-128-256-512-1 as released.
    """

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        widths = (num_classes, width, 2 * width, 4 * width, 8 * width)
        for i in range(4):
            setattr(self, f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1))
        self.classifier = nn.Conv2d(widths[4], 1, 4, stride=2, padding=1)
        self.activation = nn.LeakyReLU(0.2, inplace=True)
        self.apply(as_pbal)

    def forward(self, x: Tensor) -> Tensor:
        """Softmax maps (N, K, H, W), H and W at least 32 -> patch logits (N, 1, ~H/32, ~W/32)."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.activation(conv(x))
        return self.classifier(x)
