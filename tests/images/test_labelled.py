"""What all sets of pictures share."""

from vitreg.images import evenly


def test_evenly_spread():
    assert evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly(3, 8).tolist() == [0, 1, 2]
    assert len(set(evenly(1000, 256).tolist())) == 256
    assert evenly(5, 1).tolist() == [0]
