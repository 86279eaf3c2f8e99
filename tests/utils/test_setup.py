"""What is checked before a script's work starts."""

import pytest

from utils.config import UserError
from utils.setup import build_network, check_inputs, choose_device, prepare_data


@pytest.fixture
def cfg(configure, tmp_path):
    return configure("gta5_to_city", "stage1_BPL.yml", tmp_path)


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_device_that_is_not_there(cfg, name):
    cfg.device = name
    with pytest.raises(UserError, match=f"^device={name} cannot be used: .+$"):
        choose_device(cfg)


def test_foreign_folder_is_not_drawn_into(cfg, tmp_path):
    cfg.data.toy_root = str(tmp_path / "photos")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"photos is in use and holds no toy\.json"):
        prepare_data(cfg)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["mine.txt"]


def test_network_follows_the_seed(cfg):
    first, again = (build_network(cfg, choose_device(cfg)).classifier.weight for _ in range(2))
    cfg.seed = 1
    other = build_network(cfg, choose_device(cfg)).classifier.weight
    assert (first == again).all() and (first != other).any() and len(first) == 19


def test_every_problem_is_said_once():
    def fail(message):
        raise UserError(message)

    assert check_inputs(lambda: 1, lambda: None) == [1, None]
    with pytest.raises(UserError) as error:
        check_inputs(lambda: fail("no images"), lambda: 1, lambda: fail("no weights"), lambda: fail("no images"))
    assert str(error.value).splitlines() == ["no images", "error: no weights"]  # `guarded` puts "error: " before all
