"""Class sets and lookup tables against the datasets' own documentation."""

import numpy as np
import pytest

from data.taxonomy import CITYSCAPES_NAMES, CLASS_SETS, ID_TO_NAME, IGNORE, custom_class_set, resolve_id_map


def test_sixteen_and_thirteen_classes():
    nineteen, sixteen = CLASS_SETS["cityscapes19"], CLASS_SETS["cityscapes16"]
    assert len(nineteen) == 19 and nineteen.names == CITYSCAPES_NAMES and not nineteen.subsets
    assert [n for n in nineteen.names if n not in sixteen.names] == ["terrain", "truck", "train"]
    assert sixteen.names == tuple(n for n in nineteen.names if n in sixteen.names)  # in the same order
    assert sixteen.subsets["miou16"] == sixteen.names
    assert [n for n in sixteen.names if n not in sixteen.subsets["miou13"]] == ["wall", "fence", "pole"]
    assert len(sixteen.subsets["miou13"]) == 13
    assert sixteen.palette[sixteen.names.index("bicycle")] == nineteen.palette[18] == (119, 11, 32)


def test_train_ids_of_the_lookup_tables():
    tables = {(f, c): CLASS_SETS[c].lookup_table(ID_TO_NAME[f]) for f in ID_TO_NAME for c in CLASS_SETS}
    assert all(t.dtype == np.uint8 and len(t) == 2**16 for t in tables.values())
    for dataset in ("gta5", "cityscapes"):
        table = tables[dataset, "cityscapes19"]
        assert [table[i] for i in (7, 8, 22, 31, 33)] == [0, 1, 9, 16, 18]
        assert (table == IGNORE).sum() == 2**16 - 19 and table[34] == table[255] == IGNORE
        table = tables[dataset, "cityscapes16"]
        assert [table[i] for i in (7, 21, 23, 28, 32, 33)] == [0, 8, 9, 13, 14, 15]
        assert [table[i] for i in (22, 27, 31)] == [IGNORE] * 3
    assert [tables["synthia", "cityscapes19"][i] for i in (3, 4, 2, 21, 12, 11)] == [0, 1, 2, 3, 17, 18]
    table = tables["synthia", "cityscapes16"]
    assert [table[i] for i in (6, 1, 19, 12, 11)] == [8, 9, 13, 14, 15]
    assert [table[i] for i in (0, 13, 14, 22, 16, 18, 20, 300)] == [IGNORE] * 8  # void, then terrain, truck, train


def test_custom_class_set():
    classes = custom_class_set(["sky", "road"], [])
    assert classes.names == ("sky", "road") and len(set(classes.palette)) == 2
    for twin in ("sky", "sky "):
        with pytest.raises(ValueError, match="'sky' twice"):
            custom_class_set(["sky", twin], [])
    with pytest.raises(ValueError, match="'café' twice"):
        custom_class_set(["caf\u00e9", "cafe\u0301"], [])
    with pytest.raises(ValueError, match="an empty name"):
        custom_class_set(["sky", " "], [])
    with pytest.raises(ValueError, match="1 colours for 2 class names"):
        custom_class_set(["sky", "road"], [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"colour of 'road' is \[0, 0, 256\]"):
        custom_class_set(["sky", "road"], [[0, 0, 0], [0, 0, 256]])
    with pytest.raises(ValueError, match="holds 'ignore', the word of id_map"):
        custom_class_set(["sky", "ignore"], [])
    with pytest.raises(ValueError, match="not 1"):
        custom_class_set(["sky"], [])


def test_label_ids_of_train_ids():
    for dataset in ("cityscapes", "synthia"):
        classes = CLASS_SETS["cityscapes16"]
        back = classes.inverse_table(ID_TO_NAME[dataset])
        assert back.dtype == np.uint8 and (back[16:] == 255).all()
        assert classes.lookup_table(ID_TO_NAME[dataset])[back[:16]].tolist() == list(range(16))
    assert CLASS_SETS["cityscapes19"].inverse_table(ID_TO_NAME["cityscapes"])[[0, 9, 18]].tolist() == [7, 22, 33]
    own = custom_class_set(["sky", "road", "car"], [])
    assert own.inverse_table({3: "road", 4: "road", 0: "sky"})[:3].tolist() == [0, 3, 255]  # the first; none for car
    assert own.inverse_table({255: "road", 254: "sky"})[:3].tolist() == [254, 255, 253]  # 255 is not free
    assert own.inverse_table(dict.fromkeys(range(256), "road"))[0] == 255  # none is free
    deep = own.inverse_table({300: "sky", 1: "road"})
    assert deep.dtype == np.uint16 and deep[:3].tolist() == [300, 1, 255]


def test_id_map():
    classes = custom_class_set(["sky", "road"], [])
    table = classes.lookup_table(resolve_id_map({4: "road", 300: "sky", 0: "ignore"}, classes))
    assert table[4] == 1 and table[300] == 0 and (table == IGNORE).sum() == 2**16 - 2
    assert classes.lookup_table(resolve_id_map({}, classes))[:3].tolist() == [0, 1, IGNORE]  # ids are train ids
    with pytest.raises(ValueError, match="'raod' is not a class; nearest is 'road'"):
        resolve_id_map({4: "raod"}, classes)
    for bad in (-1, 2**16, "4", True):
        with pytest.raises(ValueError, match="is not a label id"):
            resolve_id_map({bad: "road"}, classes)
