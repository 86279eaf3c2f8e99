"""Readers: every layout gives the labels that were written, and says what is wrong with files that it cannot use."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import CUSTOM, HEIGHT, WIDTH
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.io import savemat

from data.datasets import Sample, SegmentationDataset, build_dataset, find_images, fingerprint, list_samples
from data.images import read_image, read_label_ids, read_picture, read_upper_rows
from data.loaders import whole_images
from data.taxonomy import CLASS_SETS, IGNORE, custom_class_set
from data.transforms import RandomScaleCropFlip
from utils.config import ROOT, UserError
from utils.config.keys import DatasetConfig
from utils.engine.command_line import guarded
from utils.engine.setup import checked_config

NINETEEN = CLASS_SETS["cityscapes19"]
OWN = custom_class_set(CUSTOM["class_names"], CUSTOM["palette"])


def dataset_config(**section) -> DatasetConfig:
    """A config section over the defaults of a folder dataset."""
    empty = {"split": "all", "size": [], "images": [], "labels": "", "strip": "", "id_map": {}}
    return DatasetConfig(**empty | section)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("name", "classes"),
    [*product(("gta5", "synthia", "cityscapes", "cityscapes_val"), CLASS_SETS.values()), ("day", OWN), ("dusk", OWN)],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_labels_hold_exactly_what_was_written(trees, name, classes):
    tree = trees[name]
    dataset = build_dataset(dataset_config(**tree.section), classes)
    expected = tree.pixels_of(classes.names)
    assert [s.name for s in dataset.samples] == sorted(expected)
    total = np.zeros(len(classes), int)
    for index, sample in enumerate(dataset.samples):
        item = dataset[index]
        assert item["image"].dtype == item["label"].dtype == torch.uint8 and item["index"] == index
        assert item["image"].shape == (3, HEIGHT, WIDTH) and item["label"].shape == (HEIGHT, WIDTH)
        counts = np.bincount(item["label"].numpy().ravel(), minlength=256)
        assert counts[: len(classes)].tolist() == expected[sample.name]
        assert counts[IGNORE] == HEIGHT * WIDTH - sum(expected[sample.name])
        total += counts[: len(classes)]
    assert (total > 0).all()  # else a class would go unchecked


def test_image_is_what_was_written(trees):
    dataset = build_dataset(dataset_config(**trees["synthia"].section), NINETEEN)
    for index, sample in enumerate(dataset.samples):
        np.testing.assert_array_equal(dataset[index]["image"].permute(1, 2, 0), np.asarray(Image.open(sample.image)))


def test_labels_of_an_unlabelled_domain_are_not_looked_for(copied):
    tree = copied("cityscapes")
    for path in tree.root.rglob("*_labelIds.png"):
        path.unlink()
    dataset = build_dataset(dataset_config(**tree.section), NINETEEN, with_labels=False)
    assert set(dataset[0]) == {"image", "index"}


def test_image_and_label_of_different_sizes_need_a_common_size(trees):
    section = trees["gta5"].section
    dataset = build_dataset(dataset_config(**section | {"size": []}), NINETEEN)
    assert dataset[0]["label"].shape == (HEIGHT, WIDTH)
    with pytest.raises(UserError, match=r"00005\.png is 100x62.*label.*00005\.png is 96x64; set the dataset's size"):
        dataset[4]
    for size in ([], [52, 36]):  # no size brings a picture and a label that is not turned like it to one
        turned = build_dataset(dataset_config(**section | {"size": size}), NINETEEN)
        with pytest.raises(UserError, match=r"is 64x96, but its label .* is 96x64; do they belong together\?"):
            turned.refuse_unlike_sizes(turned.samples[0], (64, 96), (96, 64))
    dataset = build_dataset(dataset_config(**section | {"size": [52, 36]}), NINETEEN)
    with pytest.raises(UserError, match=r"do they belong together\?"):
        dataset.refuse_unlike_sizes(dataset.samples[0], (64, 96), (52, 36))
    dataset.has_pseudo_labels = True  # these are written at the common size
    dataset.refuse_unlike_sizes(dataset.samples[0], (64, 96), (52, 36))
    item = dataset[4]
    assert item["image"].shape == (3, 36, 52) and item["label"].shape == (36, 52)
    full = dataset.lookup_table[trees["gta5"].ids["images/00005"]]
    rows, columns = (np.arange(36) + 0.5) * 64 / 36, (np.arange(52) + 0.5) * 96 / 52  # centres: nearest neighbour
    np.testing.assert_array_equal(item["label"], full[rows.astype(int)][:, columns.astype(int)])


def test_a_bad_file_in_training_names_the_way_on(copied):
    tree = copied("gta5")
    dataset = build_dataset(dataset_config(**tree.section), NINETEEN)
    dataset.samples[0].image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00001\.png: .*; data\.on_error=skip goes on without it$"):
        dataset[0, 7]
    with pytest.raises(UserError, match=r"00001\.png: [^;]*$"):  # in validation, none is left out
        dataset[0]


def test_gta5_split_file_is_needed_for_a_split_alone(copied):
    tree = copied("gta5")
    assert len(list_samples(dataset_config(**tree.section))) == 5
    with pytest.raises(UserError, match=r"split\.mat"):
        list_samples(dataset_config(**tree.section | {"split": "train"}))
    savemat(tree.root / "split.mat", {"trainIds": [[1.0], [4.0]], "valIds": [[2]], "testIds": [[3]]})
    names = [s.name for s in list_samples(dataset_config(**tree.section | {"split": "train"}))]
    assert names == ["images/00001", "images/00004"]
    (tree.root / "images/00002.png").unlink()
    (tree.root / "labels/00002.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 1 images that .*split\.mat lists .* first is images/00002\.png"):
        list_samples(dataset_config(**tree.section | {"split": "val"}))


def test_16_bit_label_keeps_its_first_channel(trees):
    tree = trees["synthia"]
    for name, ids in tree.ids.items():
        np.testing.assert_array_equal(read_label_ids(tree.root / f"GT/LABELS/{name[4:]}.png"), ids)


@pytest.mark.parametrize(
    ("template", "label"),
    [
        ("{dir}/{stem}.png", "a/b/x_rgb.png"),
        ("truth/{parent}/{stem}.png", "truth/b/x_rgb.png"),
        ("{stem}_id.png", "x_rgb_id.png"),
        ("{dir}annot/{stem}.png", "a/bannot/x_rgb.png"),
    ],
)
def test_label_of_a_folder_image(tmp_path, template, label):
    touch(tmp_path, "a/b/x_rgb.jpg", label)
    for images in ("a/*/*.jpg", "a/**/*.jpg"):
        cfg = dataset_config(format="folder", root=str(tmp_path), images=[images], labels=template)
        (sample,) = list_samples(cfg)
        assert sample.label == tmp_path / label and sample.name == "a/b/x_rgb"


def test_an_image_directly_below_the_root_has_a_parent_without_name(tmp_path):
    touch(tmp_path, "x.jpg", "x_gt.png")
    cfg = dataset_config(format="folder", root=str(tmp_path), images=["*.jpg"], labels="{parent}/{stem}_gt.png")
    assert [s.label for s in list_samples(cfg)] == [tmp_path / "x_gt.png"]


def test_strip_cuts_the_ending_of_the_stem_alone(tmp_path):
    touch(tmp_path, "x_rgb_rgb.jpg", "y.jpg", "x_rgb.png", "y.png")
    cfg = dataset_config(format="folder", root=str(tmp_path), images=["*.jpg"], labels="{stem}.png", strip="_rgb")
    assert [s.label.name for s in list_samples(cfg)] == ["x_rgb.png", "y.png"]


def test_several_globs_list_an_image_once(tmp_path):
    touch(tmp_path, "b.jpg", "a.png")
    cfg = dataset_config(format="folder", root=str(tmp_path), images=["*.jpg", "*.png", "b.*"])
    assert [s.name for s in list_samples(cfg, with_labels=False)] == ["a", "b"]


def test_globs_without_an_image_and_labels_of_several_images_are_named(tmp_path):
    touch(tmp_path, "day/a.jpg", "dusk/a.jpg", "a.png")
    section = {"format": "folder", "root": str(tmp_path), "labels": "{stem}.png"}
    listed = list_samples(dataset_config(**section, images=["*/*.jpg", "night/*.jpg"]))
    assert len(listed) == 2
    unmatched, shared = listed.note.split("; ")
    assert unmatched == f"no image below {tmp_path} matches night/*.jpg"
    assert shared.startswith(f"1 images below {tmp_path} share the label of another: dusk/a.jpg and day/a.jpg have ")
    with pytest.raises(UserError, match=f"images: {tmp_path}/day/b.jpg is missing"):
        list_samples(dataset_config(**section, images=["day/a.jpg", "day/b.jpg"]))


def test_missing_files_are_named(copied, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; get it at https://.*synthia"):
        list_samples(dataset_config(format="synthia", root=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"no synthia image matches RGB/\*\.png"):
        list_samples(dataset_config(format="synthia", root=str(tmp_path)))
    tree = copied("cityscapes")
    path = sorted(tree.root.rglob("gtFine/train/*/*.png"))[2]
    path.unlink()
    with pytest.raises(UserError, match=f"1 of 5 labels .* the first is {path}"):
        list_samples(dataset_config(**tree.section))
    tree = copied("day")
    with pytest.raises(UserError, match="`labels` key is empty"):
        list_samples(dataset_config(**tree.section | {"labels": ""}))
    for template in ("{city}.png", "{}.png", "{stem", "{stem.x}.png", "{stem:05d}.png", "{stem!r}.png"):
        with pytest.raises(UserError, match=r"may hold {dir}, {parent} and {stem} alone"):
            list_samples(dataset_config(**tree.section | {"labels": template}))


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_label_is_no_image(tmp_path, with_labels):
    for name in ("a.jpg", "b.jpg", "a_L.png", "b_L.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    for labels in ("{stem}_L.png", f"../{tmp_path.name}/{{stem}}_L.png"):
        cfg = dataset_config(format="folder", root=str(tmp_path), images=["*"], labels=labels)
        with pytest.raises(
            UserError, match=r"2 files are both image and label, the first is .*a_L\.png: narrow the globs"
        ):
            list_samples(cfg, with_labels)


def test_an_id_beyond_the_classes_is_refused_without_an_id_map(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    Image.new("L", (8, 8), 19).save(tmp_path / "a.png")
    cfg = dataset_config(format="folder", root=str(tmp_path), images=["*.jpg"], labels="{stem}.png")
    with pytest.raises(UserError, match=r"a\.png holds id 19, which is none of this dataset's"):
        build_dataset(cfg, NINETEEN)[0]


@pytest.mark.parametrize("glob", ["/abs/*.jpg", "", ".", "day", "day/"])
def test_impossible_glob_is_the_users_mistake(tmp_path, glob):
    (tmp_path / "day").mkdir()
    with pytest.raises(UserError, match="images"):
        list_samples(dataset_config(format="folder", root=str(tmp_path), images=[glob]), with_labels=False)


def test_unreadable_files_are_named(copied):
    tree = copied("gta5")
    dataset = build_dataset(dataset_config(**tree.section), NINETEEN)
    for kind, index in (("image", 1), ("label", 2)):
        path = getattr(dataset.samples[index], kind)
        whole = path.read_bytes()
        for content in (b"", b"no picture", whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"cannot read {kind} {path}: ") as error:
                dataset[index]
            assert "\n" not in str(error.value)
    label = dataset.samples[3].label
    Image.new("RGB", (WIDTH, HEIGHT)).save(label)
    with pytest.raises(UserError, match=f"label {label} is an 8-bit picture of mode RGB"):
        dataset[3]


def test_unreadable_file_is_one_line_from_a_worker_process_too(copied, capsys):
    dataset = build_dataset(dataset_config(**copied("synthia").section), NINETEEN)
    path = dataset.samples[0].image
    path.write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        guarded(lambda: list(whole_images(dataset, 1, workers=1)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read image {path}: ")


def crops(**changes):
    d = checked_config(ROOT / "configs/stage1_BPL.yml").data
    for key, value in ({"base_width": 0, "crop": [64, 32]} | changes).items():
        setattr(d, key, value)
    return RandomScaleCropFlip(d)


def test_training_takes_crops_of_what_is_read_whole_otherwise(trees):
    """Whatever rows the decoder leaves out, and where image and label differ in size."""
    for name, size in (("gta5", [52, 36]), ("gta5", [100, 62]), ("synthia", []), ("day", [])):
        section, transform = dataset_config(**trees[name].section | {"size": size}), crops(scale=[0.3, 4.0])
        dataset = build_dataset(section, OWN if name == "day" else NINETEEN, transform=transform, seed=3)
        for draw in range(40):
            index = draw % len(dataset)
            sample, item = dataset.samples[index], dataset[index, draw]
            picture = Image.fromarray(read_image(sample.image).permute(1, 2, 0).numpy())
            crop = transform(size or picture.size, np.random.default_rng([3, draw, 1]))
            assert torch.equal(item["image"], crop.of_image(picture))
            label = crop.of_label(read_label_ids(sample.label), dataset.lookup_table.take)
            assert torch.equal(item["label"], label)


@pytest.mark.parametrize("library", ["Pillow", "kornia_rs"])
def test_rows_below_the_crop_are_not_decoded_of_a_sound_png_alone(tmp_path, monkeypatch, library):
    if library == "Pillow":
        monkeypatch.setattr("data.images.decode_png", None)
    rows = 26 if library == "Pillow" else 100
    pixels = np.random.default_rng(0).integers(1, 256, (100, 80, 3), np.uint8)
    picture, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x0112] = 3  # upside down
    picture.save(tmp_path / "sound.png")
    picture.save(tmp_path / "turned.png", exif=turned)
    picture.save(tmp_path / "other.tif")
    top, size = read_upper_rows(tmp_path / "sound.png", lambda size: 0.25 if size == (80, 100) else 1)
    assert size == (80, 100)
    np.testing.assert_array_equal(top, pixels[:rows])
    for name, expected in {"turned.png": pixels[::-1, ::-1], "other.tif": pixels}.items():
        picture, size = read_upper_rows(tmp_path / name, lambda size: 0.25)
        assert size == (80, 100)
        np.testing.assert_array_equal(picture, expected)
    whole = (tmp_path / "sound.png").read_bytes()
    for cut in (500, 4000):  # of the last quarter
        (tmp_path / "cut.png").write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"cannot read image .*cut\.png: "):
            read_upper_rows(tmp_path / "cut.png", lambda size: 0.25)
    (tmp_path / "checksum.png").write_bytes(whole[:29] + bytes(4) + whole[33:])  # of the header
    with pytest.raises(UserError, match=r"cannot read image .*checksum\.png: "):
        read_upper_rows(tmp_path / "checksum.png", lambda size: 0.25)
    (tmp_path / "longer.png").write_bytes(whole + b"trailing bytes")
    np.testing.assert_array_equal(read_picture(tmp_path / "longer.png"), pixels)


def test_kornia_and_pillow_read_the_same_of_any_png(tmp_path, monkeypatch):
    from data.images import decode_png

    rng = np.random.default_rng(0)
    picture, entries = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)), PngInfo()
    entries.add(b"gAMA", (100000).to_bytes(4))
    entries.add(b"tIME", b"damaged")
    for name, options in {
        "plain": {},
        "transparent": {"transparency": (1, 2, 3)},
        "entries": {"pnginfo": entries},
    }.items():
        picture.save(tmp_path / f"{name}.png", **options)
    for mode in ("L", "P", "1", "RGBA", "LA", "I;16"):
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / f"{mode[:2]}.png")
    whole = (tmp_path / "plain.png").read_bytes()
    for i in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(8, len(whole), 1 + i % 3):
            damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / f"damaged{i}.png").write_bytes(damaged[: rng.integers(len(whole))] if i % 2 else damaged)
    read = 0
    for file in sorted(tmp_path.iterdir()):
        seen = []
        for decoder in (decode_png, None):
            monkeypatch.setattr("data.images.decode_png", decoder)
            try:
                seen.append(read_picture(file).tobytes())
                read += decoder is None
            except UserError as error:
                seen.append(str(error))
        assert seen[0] == seen[1], file
    assert 9 <= read < 209


def test_unknown_id_is_said_where_it_is_in_the_crop(copied):
    tree = copied("gta5")
    dataset = build_dataset(dataset_config(**tree.section), NINETEEN, transform=crops(scale=[0.7, 0.7]))
    path = dataset.samples[0].label
    ids = np.array(Image.open(path))
    ids[0] = 77  # the uppermost row: in few crops
    Image.fromarray(ids).save(path)
    said = 0
    for draw in range(60):
        crop = dataset.transform((WIDTH, HEIGHT), np.random.default_rng([0, draw, 1]))
        if crop.top == 0:
            said += 1
            with pytest.raises(UserError, match=rf"label {path} holds id 77"):
                dataset[0, draw]
        else:
            assert dataset[0, draw]["label"].shape == (32, 64)
    assert 0 < said < 20
    dataset.transform = None
    with pytest.raises(UserError, match=rf"label {path} holds id 77"):
        dataset[0]


def test_grey_images_become_colour(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), torch.full((3, 3, 4), 7, dtype=torch.uint8))


def test_deep_and_transparent_images_become_8_bit_colour(tmp_path):
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").tolist() == [[[0, 0, 1, 255]]] * 3
    Image.new("RGBA", (4, 3), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [1, 2, 3]
    Image.new("F", (4, 3)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"cannot read image .*float\.tif: floating-point pixels"):
        read_image(tmp_path / "float.tif")


def test_exif_rotation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise to be upright
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 40, 30)


def test_images_of_a_path_a_folder_or_a_glob(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.JPG", "a/deep/er/y.png", "a/notes.txt", "a/._x.jpg", "b/x.jpg", "[1].png", "a/x[2].png")

    def names(pattern):
        return [(s.name, s.label) for s in find_images(str(pattern))]

    assert names(tmp_path / "a") == [("deep/er/y", None), ("x", None), ("x[2]", None)]
    assert names(tmp_path / "*/x.*") == [("a/x", None), ("b/x", None)]
    assert names(tmp_path / "**/*.png") == [("[1]", None), ("a/deep/er/y", None), ("a/x[2]", None)]
    assert names(tmp_path / "[1].png") == [("[1]", None)] and names(tmp_path / "a/notes.txt") == [("notes", None)]
    monkeypatch.chdir(tmp_path)
    assert names("*/*.JPG") == names("*/*.jpg") == [("a/x", None), ("b/x", None)] and names(".") == names(tmp_path)
    touch(tmp_path, "in [2024]/deep/z.jpg")
    assert names("in [2024]/**/*.jpg") == [("deep/z", None)]  # brackets of a folder's own name
    for nothing in ("c", "a/*.gif", "a/*.txt"):
        with pytest.raises(UserError, match="no image at "):
            find_images(nothing)
    (tmp_path / "a/runs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/runs/panel.png")
    assert "runs/panel" in [name for name, _ in names("a")]
    assert [s.name for s in find_images("a", "a/runs")] == ["deep/er/y", "x", "x[2]"]  # what the code wrote itself
    assert [s.name for s in find_images("a/runs", "a/runs")] == ["panel"]
    assert [s.name for s in find_images("b/../a", "b/../a/runs")] == ["deep/er/y", "x", "x[2]"]
    touch(tmp_path, "a/x.webp")
    with pytest.raises(UserError, match=f"{tmp_path}/a/x.JPG and {tmp_path}/a/x.webp would have one name"):
        find_images("a")


def test_brackets_may_belong_to_a_name(tmp_path):
    touch(tmp_path, "day [1]/x.png", "day 1/y.png", "day 1/z[0].png", "day 1/z0.png")

    def names(*globs):
        return [s.name for s in list_samples(folder_of(tmp_path, *globs), with_labels=False)]

    assert names("day [1]/*.png") == ["day [1]/x"]
    assert names("day 1/z[0].png") == ["day 1/z0", "day 1/z[0]"]


def folder_of(tmp_path, *images, **section):
    return dataset_config(format="folder", root=str(tmp_path), images=list(images), **section)


@pytest.mark.parametrize("glob", ["*/*.png", "**/*.png", "**/*"])
def test_linked_folders_are_entered_but_not_into_themselves(tmp_path, glob):
    touch(tmp_path, "tree/a/0.png", "other/deep/1.png")
    (tmp_path / "tree/b").symlink_to(tmp_path / "other/deep")
    for name in ("tree/a/loop", "other/deep/loop"):
        (tmp_path / name).symlink_to(tmp_path / "tree")
    (tmp_path / "tree/itself").symlink_to(tmp_path / "tree/itself")
    listed = list_samples(folder_of(tmp_path / "tree", glob), with_labels=False)
    assert [s.name for s in listed] == [s.name for s in find_images(str(tmp_path / "tree" / glob))] == ["a/0", "b/1"]


def test_endings_in_upper_case_and_what_is_not_taken(tmp_path):
    touch(tmp_path, "i/0.jpg", "i/1.JPG", "i/2.Jpg", "i/3.jpeg", "i/notes.txt", "i/.4.jpg", "l/0.png", "l/1.PNG")
    (tmp_path / "i/5.jpg").symlink_to("nowhere")
    cfg = folder_of(tmp_path, "i/*.jpg", labels="l/{stem}.png")
    listed = list_samples(cfg, with_labels=False)
    assert [s.image.name for s in listed] == ["0.jpg", "1.JPG", "2.Jpg", "5.jpg"]  # the broken link is found missing
    assert listed.note == (f"not taken: 2 files below {tmp_path} (1 .jpg, 1 .jpeg), the first is i/.4.jpg")
    (tmp_path / "i/5.jpg").unlink()
    listed = list_samples(folder_of(tmp_path, "i/*.[jp][pn]g"), with_labels=False)
    assert [s.image.name for s in listed] == ["0.jpg", "1.JPG", "2.Jpg"]
    touch(tmp_path, "d/cam.Left_1.png", "d/cam.Left_2.PNG", "d/v1.0_Scene.png")
    for glob, number in (("d/cam.Left_*", 2), ("d/v1.0_S*", 1)):
        assert len(list_samples(folder_of(tmp_path, glob), with_labels=False)) == number
    (tmp_path / "i/2.Jpg").unlink()
    assert [s.label.name for s in list_samples(cfg)] == ["0.png", "1.PNG"]
    found = find_images(str(tmp_path / "i"))
    assert [s.name for s in found] == ["0", "1", "3"] and "2 files" in found.note and ".txt" in found.note
    assert SegmentationDataset(found).notes == [found.note]
    touch(tmp_path, "only/0.gif")
    with pytest.raises(UserError, match=r"not taken: 1 files below .*only \(1 \.gif\)"):
        find_images(str(tmp_path / "only"))


def test_labels_beside_their_images_are_not_left_out(tmp_path):
    touch(tmp_path, "0.jpg", "0.png", "1.jpg", "1.png")
    assert list_samples(folder_of(tmp_path, "*.jpg", labels="{stem}.png")).note == ""
    assert "2 .png" in list_samples(folder_of(tmp_path, "*.jpg"), with_labels=False).note


@pytest.mark.parametrize("name", ["gta5", "synthia", "cityscapes", "cityscapes_val", "day", "dusk"])
def test_nothing_is_left_out_of_clean_trees(trees, name):
    assert list_samples(dataset_config(**trees[name].section)).note == ""


def test_fingerprint_of_labels(tmp_path):
    for name, content in (("x.png", b"image"), ("x_l.png", b"label")):
        (tmp_path / name).write_bytes(content)
    samples = [Sample(tmp_path / "x.png", tmp_path / "x_l.png", "x")]
    images, labels = fingerprint(samples), fingerprint(samples, labels=True)
    (tmp_path / "x_l.png").write_bytes(b"corrected")
    assert fingerprint(samples) == images and fingerprint(samples, labels=True) != labels


def test_fingerprint_of_uncompressed_images(tmp_path):
    """Their size is the same whatever they show."""
    samples, found = [Sample(tmp_path / "x.bmp", None, "x")], set()
    for brightness in (10, 20):
        Image.new("RGB", (9, 9), (brightness,) * 3).save(tmp_path / "x.bmp")
        found.add(fingerprint(samples))
    assert len(found) == 2


def test_a_path_may_begin_with_the_sign_for_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("~x.png")
    assert [sample.name for sample in find_images("~x.png", "~runs")] == ["~x"]
