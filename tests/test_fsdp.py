"""Two processes (gloo), with sharded weights (FSDP2) or DDP, against one with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

from .fsdp_processes import (
    COUNTS,
    DDP_CASES,
    MASKED,
    MAX_GRAD_NORM,
    PROBABILITIES,
    eomt,
    eomt_loss,
    final_state,
    gradients,
    optimizer_of,
    steps,
    vit_p,
    vit_p_loss,
)
from .sharding import load_whole_state, shard_model, whole_state
from .tiny_models import randomize

MODELS = {"eomt": (eomt, eomt_loss), "vit_p": (vit_p, vit_p_loss)}
# float32 sums in another order; wrong normalisers differ by tens of percent.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that two processes wrote to."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fsdp_processes", str(folder)]
    root = Path(__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}, cwd=root, **pipes)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return folder


@pytest.fixture(scope="module")
def records(two_processes):
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(two_processes / "records.safetensors").items():
        case, _, name = name.partition("|")
        tensors.setdefault(case, {})[name] = tensor
    return tensors


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to a share of the largest value of each tensor, or of all: the key bias has no gradient but noise."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=TOLERANCE * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def starting_with(prefix, record):
    return {name.removeprefix(prefix): tensor for name, tensor in record.items() if name.startswith(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("kind", MODELS)
def test_sharded_training_equals_one_process(records, kind, case):
    build, loss = MODELS[kind]
    model = build()
    optimizer = optimizer_of(model)
    expected = steps(model, optimizer, loss(COUNTS[case]), PROBABILITIES)
    found = records[f"{kind}, {case}"]
    assert (expected["norms"] > MAX_GRAD_NORM).all(), "or clipping were not tested"
    for name in ("losses", "norms"):
        torch.testing.assert_close(found[name], expected[name], rtol=TOLERANCE, atol=0)
    assert_close(starting_with("gradient/", found), starting_with("gradient/", expected))
    final = final_state(model, optimizer)
    assert_close(starting_with("moment/", found), starting_with("moment/", final))
    weights = starting_with("weight/", final)
    assert starting_with("weight/", found).keys() == weights.keys()
    start = build().state_dict()
    for name, weight in weights.items():
        moved = (weight - start[name]).abs().max() if weight.numel() else torch.tensor(0.0)
        # AdamW turns what is nothing but noise, such as the gradient of a key bias, into steps of full length.
        atol = 2 * float(moved) if "k_proj.bias" in name else 0.05 * float(moved)
        torch.testing.assert_close(found[f"weight/{name}"], weight, rtol=0, atol=atol)


@pytest.mark.slow
def test_a_checkpoint_of_sharded_weights_is_an_ordinary_one(records, two_processes):
    model = EoMTForUniversalSegmentation.from_pretrained(two_processes / "checkpoint")
    found = starting_with("weight/", records[f"eomt, {list(COUNTS)[-1]}"])
    weights = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in found.items())
    assert model.config.masked_attention_probabilities == PROBABILITIES[-1]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*DDP_CASES, "checkpointed"])
def test_ddp_uses_every_parameter(records, case):
    found = records[f"ddp eomt, {case}"]
    if case == "annealing":  # which queries are masked is drawn on each process
        assert len(found) > 50
        assert all(gradient.isfinite().all() for gradient in found.values())
        return
    model = eomt(**DDP_CASES.get(case, MASKED))
    counts = COUNTS["few and many" if case == "checkpointed" else "none on one process"]
    eomt_loss(counts)(model, 0, 1).backward()
    assert_close(found, gradients(model))


@pytest.mark.slow
@pytest.mark.parametrize("case", COUNTS)
def test_ddp_of_point_classifiers(records, case):
    model = vit_p()
    vit_p_loss(COUNTS[case])(model, 0, 1).backward()
    assert_close(records[f"ddp vit_p, {case}"], gradients(model))


def test_only_models_with_blocks_are_sharded():
    with pytest.raises(ValueError, match="Linear has no block of a plain ViT to shard"):
        shard_model(nn.Linear(2, 2))


def test_states_of_one_process_go_through_the_same_functions():
    model, other = eomt(), randomize(eomt(), seed=9)
    optimizer, other_optimizer = optimizer_of(model), optimizer_of(other)
    loss = eomt_loss(COUNTS["few and many"])
    steps(model, optimizer, loss, PROBABILITIES[:1])
    load_whole_state(other, other_optimizer, *whole_state(model, optimizer))
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        steps(one, its_optimizer, loss, PROBABILITIES[1:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
