"""What all sets of images share."""

from vitreg.images import spaced_indices


def test_evenly_spread():
    assert spaced_indices(10, 4).tolist() == [0, 3, 6, 9]
    assert spaced_indices(3, 8).tolist() == [0, 1, 2]
    assert len(set(spaced_indices(1000, 256).tolist())) == 256
    assert spaced_indices(5, 1).tolist() == [0]
