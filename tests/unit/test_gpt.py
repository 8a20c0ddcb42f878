"""The PyTorch GPT as training sees it; that its numbers are right, the goldens show (tests/parity)."""

from __future__ import annotations

import math

import pytest
from tiny_model import tiny_checkpoint

torch = pytest.importorskip("torch")

from nanogpt.model.config import GPTConfig  # noqa: E402
from nanogpt.model.gpt import GPT, Dropout  # noqa: E402

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=400, num_tokens=390)


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"tied": False}, {"bias": False, "tied": False, "n_inner": 24}]
)
def test_parameters_are_the_canonical_tensors(changes: dict[str, bool]) -> None:
    """So that a checkpoint's tensors are the state dict, and training's state dict is a checkpoint."""
    config = tiny_checkpoint(**changes).config
    state = GPT(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == config.tensor_shapes()
    assert sum(p.numel() for p in GPT(config).parameters()) == config.num_parameters()


def test_initial_weights_are_nanogpts() -> None:
    torch.manual_seed(0)
    for name, parameter in GPT(CONFIG).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / math.sqrt(2 * CONFIG.n_layer) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    idx = torch.randint(CONFIG.num_tokens, (4, 32))
    logits, loss = GPT(CONFIG)(idx, idx.roll(-1, 1))
    assert logits.shape == (4, 32, CONFIG.vocab_size)
    assert loss.item() == pytest.approx(math.log(CONFIG.vocab_size), abs=0.1)
    assert GPT(CONFIG)(idx)[1] is None


def test_loss_is_the_mean_over_the_targets_that_count() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    idx = torch.randint(CONFIG.num_tokens, (1, 8))
    targets = torch.tensor([[1, 2, 3, -1, -1, 4, -1, 5]])
    logits, loss = model(idx, targets)
    counted = targets[0] >= 0
    expected = -logits[0].log_softmax(-1)[counted, targets[0, counted]].mean()
    torch.testing.assert_close(loss, expected)


def test_no_position_sees_what_follows() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    idx = torch.randint(CONFIG.num_tokens, (1, 16))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % CONFIG.num_tokens
    a, b = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10:], b[:, 10:])


def test_it_learns_and_the_tied_head_learns_with_the_embedding() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    idx = torch.randint(CONFIG.num_tokens, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dropout", [Dropout(residual=0.5), Dropout(attention=0.5)])
def test_dropout_acts_in_training_only(dropout: Dropout) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG, dropout=dropout)
    idx = torch.randint(CONFIG.num_tokens, (1, 8))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_a_loaded_model_can_be_trained_on() -> None:
    model = GPT.from_checkpoint(tiny_checkpoint())
    _, loss = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    loss.backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())
