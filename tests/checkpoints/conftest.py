"""What the tests of checkpoints share."""

import pytest
import timm

create_model = timm.create_model


@pytest.fixture
def narrow(monkeypatch):
    """Every architecture with two narrow blocks, so that a name still means its own kind of model."""
    narrow = dict(depth=2, embed_dim=96, num_heads=3)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kw: create_model(*args, **{**narrow, **kw}))
