"""A run's page: complete in itself, well-formed, with every name escaped, and built from whatever is there."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from utils.config import UserError
from utils.report.markup import heat_map
from utils.report.page import find_runs, score_table, title_of, write_report

EVIL = '<script>alert("x")</script> & co'
NAMES = ["road", EVIL]
VOID = {"meta", "img", "br"}


class Strict(HTMLParser):
    """Refuses tags that are closed in another order than they were opened; collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.tags_with_attributes = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.tags_with_attributes.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    page = Strict()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def scores(miou, iteration=4):
    iou = {"road": miou, EVIL: None}
    return {
        "miou": miou,
        "iou": iou,
        "pixels": {"road": 90, EVIL: 10},
        "iteration": iteration,
        "confusion": [[80, 10], [5, 5]],
    }


def make_run(folder, name, miou):
    run = folder / name
    (run / "panels").mkdir(parents=True)
    data = {"class_set": "custom", "class_names": NAMES, "palette": [[1, 2, 3], [4, 5, 6]]}
    stage = {"source_only": "warmup"}.get(name, name.split("/")[0])
    config = {
        "git": "abc",
        "benchmark": "mine.yml",
        "stage": stage,
        "seed": 3,
        "name": name,
        "note": EVIL,
        "data": data,
    }
    config |= {"pseudo_labels": "pseudo_labels", "model": {"backbone": "resnet18"}}
    (run / "config.yml").write_text(yaml.safe_dump(config))
    lines = [{"step": s, "group": "train", "loss": {"ce_source": 1 / s, "s2t": None}, "lr": 0.1} for s in range(1, 5)]
    lines += [{"step": s, "group": "val", **scores(miou * s / 4, s)} for s in (2, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 5, "gro')
    (run / "metrics.json").write_text(json.dumps({"last": scores(miou), "best": scores(miou)}))
    Image.new("RGB", (64, 32), "red").save(run / "panels" / "000004.png")


@pytest.fixture
def folder(tmp_path):
    """A benchmark's folder with all that a page can show, and two control rows."""
    runs = {"source_only": 30.0, "bpl": 40.0, "pst": 50.0, "distill/round2": 60.0}
    for name, miou in runs.items():
        make_run(tmp_path, name, miou)
    rows = {name.split("/")[0]: scores(miou) | {"best_miou": miou} for name, miou in runs.items()}
    rows |= {"source_only_target_bn": scores(35.0), "labelled_bound": scores(70.0)}
    (tmp_path / "summary.json").write_text(json.dumps({"benchmark": "mine.yml", "stages": rows}))
    Image.new("RGB", (2400, 64), "blue").save(tmp_path / "panel.png")
    return tmp_path


def test_page_of_a_benchmark_is_complete_and_asks_nobody(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    page, raw = parsed(path), path.read_text(encoding="utf-8")
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    addresses = [v for k, v in page.attributes if k in ("src", "href", "srcset", "data", "action")]
    assert len(addresses) == 1 and all(v.startswith("data:image/jpeg;base64,") for v in addresses)
    assert not re.search(r"url\(|@import|https?:", raw)
    text = " ".join(page.text)
    for title in ("mIoU by stage", "Predictions", "IoU by class", "Confusion", "Configuration"):
        assert title in text, title
    assert "with target labels" in text and "source only, target BN" in text and "60.0" in text
    shown = [attributes for tag, attributes in page.tags_with_attributes if tag == "details"]
    assert len(shown) == 4 + 4 and shown.count([("open", None)]) == 1  # confusion matrices, that of the result open
    assert text.index("with target labels") < text.index("Confusion") < text.index("true classes")


def test_names_and_configs_are_text_and_nothing_else(folder):
    raw = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in raw and "&lt;script&gt;" in raw
    assert any(EVIL in text for text in parsed(folder / "report.html").text)


@pytest.mark.parametrize(
    "missing",
    ["summary.json", "panel.png", "bpl/metrics.json"]
    + [f"distill/round2/{name}" for name in ("metrics.json", "config.yml", "panels/000004.png")],
)
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_page_without_one_of_its_files(folder, missing, damage):
    (folder / missing).unlink() if damage == "missing" else (folder / missing).write_text('{"cut": ')
    text = " ".join(parsed(write_report(folder)).text)
    assert "Configuration" in text and "PST" in text and "50.0" in text


def test_page_of_one_run(folder):
    page = parsed(write_report(folder / "pst"))
    text = " ".join(page.text)
    assert "last checkpoint" in text and "best checkpoint" in text and "Predictions" in text
    assert "BPL" not in text and len([1 for k, v in page.attributes if k == "src"]) == 1


def test_page_of_several_seeds(tmp_path, folder):
    row = {
        "miou": {"mean": 50.25, "std": 1.5},
        "iou": {"road": {"mean": 90.0, "std": 0.5}, EVIL: None},
        "statistics": "target",
    }
    content = {"seeds": [0, 1], "folders": {"0": "../seed0/b", "1": "../seed1/b#"}, "stages": {"pst": row}}
    for place, others in ((tmp_path / "alone", False), (folder, True)):  # below a summary of one seed, beside its rows
        place.mkdir(exist_ok=True)
        (place / "seeds.json").write_text(json.dumps(content))
        page = parsed(write_report(place))
        text = " ".join(page.text)
        assert all(said in text for said in ("Over seeds", "50.2 ± 1.5", "90.0 ± 0.5", "over 2 seeds")), text
        assert ("href", "../seed1/b%23/report.html") in page.attributes
        assert ("mIoU by stage" in text) == others


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_come_in_the_order_of_the_stages(folder):
    make_run(folder, "bpl_weaker", 20.0)
    assert [r.name for r in find_runs(folder)] == ["source_only", "bpl", "pst", "distill/round2", "bpl_weaker"]
    (folder / "pst").rename(folder.parent / "elsewhere")
    (folder / "pst").symlink_to(folder.parent / "elsewhere")
    for link, place in (("bpl/above", "."), ("ablation/pst/plain", "pst"), ("a_best", "pst")):
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(folder / place)
    names = ["source_only", "bpl", "pst", "distill/round2", "a_best", "bpl_weaker"]  # round in none
    assert [r.name for r in find_runs(folder)] == names
    assert title_of("distill/round2") == "distilled, round 2" and title_of("bpl_weaker") == "bpl weaker"


@pytest.mark.parametrize("stages", ["null", "[]", '{"bpl": 3}', '{"bpl": {"miou": "high", "iou": 3}}', "[" * 10**5])
def test_a_summary_of_another_form_leaves_a_gap(folder, stages):
    (folder / "summary.json").write_text(f'{{"stages": {stages}}}')
    text = parsed(write_report(folder)).text
    assert "Configuration" in text and ("mIoU by stage" in text) == ("high" not in stages)  # of the runs' own scores


def test_gain_is_over_the_control(folder):
    summary = json.loads((folder / "summary.json").read_text())
    compared = {"control_miou_target_bn": 58.0, "gain_over_control": 2.0, "gap_closed_from_source_only_long": 16.7}
    summary["stages"]["distill"] |= compared
    (folder / "summary.json").write_text(json.dumps(summary))
    text = " ".join(parsed(write_report(folder)).text)
    assert all(said in text for said in ("58.0", "2.0", "16.7", "of the gap", "for as many steps"))


def test_columns_without_numbers_are_left_out(folder):
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["stages"].values():
        row["gap_closed_from_source_only_long"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    text = " ".join(parsed(write_report(folder)).text)
    assert "rarest" not in text.lower() and "of the gap" not in text.lower()
    assert "mIoU over 1 of 2 classes" in text
    for row in summary["stages"].values():
        row |= {"miou_rarest": 12.3, "rarest": ["road"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = " ".join(parsed(write_report(folder)).text)
    assert "Rarest classes: road" in text and "12.3" in text


def test_paths_that_are_not_utf8(folder):
    config = yaml.safe_load((folder / "pst" / "config.yml").read_text()) | {"checkpoint": "caf\udce9.pth"}
    (folder / "pst" / "config.yml").write_text(yaml.safe_dump(config))
    page = write_report((folder / "pst").rename(folder / "caf\udce9"))
    assert r"caf\udce9" in page.read_text(encoding="utf-8")


def test_heat_map_counts_in_percent_of_the_truth():
    markup = heat_map(np.array([[3, 1], [0, 0]]), ["a", "b"])
    cells = re.findall(r'title="([^"]+)" style="--share:(\d+)%"[^>]*>(\d*)<', markup)
    assert cells == [
        ("a taken for a: 75.0 %", "75", "75"),
        ("a taken for b: 25.0 %", "25", "25"),
        ("b taken for a: 0.0 %", "0", ""),
        ("b taken for b: 0.0 %", "0", ""),
    ]


def test_rows_whose_means_are_of_different_classes_are_named():
    rows = {
        "bpl": {"miou": 1.0, "iou": {"road": 1.0, "sky": 1.0}},
        "pst": {"miou": 1.0, "iou": {"road": 1.0, "sky": None}},
    }
    assert score_table(rows)[2] == ["mIoU over 1 of 2 classes: no pixel of sky (pst)."]
    rows["bpl"] = rows["pst"]
    assert score_table(rows)[2] == ["mIoU over 1 of 2 classes: no pixel of sky."]
