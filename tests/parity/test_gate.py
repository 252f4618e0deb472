"""The parity gate: every family passes it, and a state that is wrong in any method does not, and is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import refine_lab
from refine_lab.models import FastWeightLM, State, Trace
from refine_lab.parity import Parity, default_prefixes, parity, parity_of
from refine_lab.parity.__main__ import main
from refine_lab.recipes import midtrain
from tests.factories.parity import FAMILIES, make
from tests.factories.step import make_policy
from tests.support.refusals import naming

PREFIXES = (1, 2, 63, 64, 65, 126, 128, 1000)
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
MUON_GRADIENT = 1e-4  # of float32, where updates are orthogonalised


def held_to_the_bars(name: str, dtype: torch.dtype, prefixes: tuple[int, ...]) -> None:
    """No row above the bound, whatever the gate allows for rounding."""
    found = parity(make(name, dtype), prefixes=prefixes)
    found.check()
    assert {row.prefix for row in found.rows} >= set(prefixes)
    for row in found.rows:
        muon = "muon" in name and row.quantity == "gradient" and dtype == torch.float32
        assert row.error <= (MUON_GRADIENT if muon else BOUNDS[dtype]), str(row)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_holds_around_the_border_of_a_chunk(name):
    held_to_the_bars(name, torch.float64, (1, 63, 65, 126))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_holds_up_to_1000_tokens(name, dtype):
    held_to_the_bars(name, dtype, PREFIXES)


# -- what is wrong is found and named --------------------------------------------------------------------------------

Fault = Callable[[Trace, State | None], Trace]


def with_fault(fault: Fault, dtype: torch.dtype = torch.float32) -> FastWeightLM:
    """DeltaNet whose traces went through `fault`, which also sees the state that was read from."""
    policy = make_policy(dtype)
    read = policy.read
    policy.read = lambda input_ids, lengths=None, state=None: fault(read(input_ids, lengths, state), state)
    return policy


def in_layer(number: int, change: Callable[[Callable, Tensor], dict[str, Tensor]]) -> Fault:
    """`change` makes one layer's part of a state from its function and the positions; only in traces that start at 0."""

    def fault(trace: Trace, state: State | None) -> Trace:
        layers = list(trace.layers)
        layers[number] = lambda positions, true=layers[number]: change(true, positions)
        return replace(trace, layers=layers) if state is None else trace

    return fault


def one_token_late(*names: str) -> Callable[[Callable, Tensor], dict[str, Tensor]]:
    def change(true: Callable, positions: Tensor) -> dict[str, Tensor]:
        late = true((positions - 1).clamp_min(0))
        return {name: late[name] if name in names else x for name, x in true(positions).items()}

    return change


def wrong(found: Parity) -> set[str]:
    return {row.quantity for row in found.rows if not row.holds}


@pytest.mark.parametrize("tensor", ["conv_state_k", "recurrent_state"])
def test_a_state_of_one_token_before_is_found_in_its_layer(tensor):
    found = parity(with_fault(in_layer(1, one_token_late(tensor))), prefixes=(2, 64))
    assert not found.holds
    assert {"hidden", "logits", "decoded", "gradient"} <= wrong(found)
    assert found.layer == "model.layers.1"
    with pytest.raises(
        RuntimeError, match=r"hidden after 2 tokens \(row ., branch ., token .\) is off by .*layers\.1 is"
    ):
        found.check()


def spoiled(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> FastWeightLM:
    """A LaCT whose first traces give states that hang on fast weights as `change` leaves them."""
    policy = make(name, torch.float64)
    read = policy.read

    def fault(input_ids, lengths=None, state=None):
        trace = read(input_ids, lengths, state)
        layers = [lambda used, true=true: change(true(used)) for true in trace.sharing.layers]
        return replace(trace, sharing=replace(trace.sharing, layers=layers)) if state is None else trace

    policy.read = fault
    return policy


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lact-momentum", lambda w: {key: x * (not key.endswith("momentum")) for key, x in w.items()}),
        ("lact-muon", lambda w: {key: x * (not key.endswith("momentum")) for key, x in w.items()}),
        ("lact-prenorm", lambda w: {key: w[key.removesuffix("_sum")] for key in w}),
    ],
    ids=["momenta", "momenta of Muon", "sums of pre-norm"],
)
def test_what_a_second_update_needs_is_found_by_default(name, change):
    assert {"hidden", "logits", "decoded"} <= wrong(parity(spoiled(name, change)))
    assert parity(spoiled(name, change), prefixes=(1, 63, 65)).holds, "these do not reach a second update"


def test_a_length_that_is_wrong_is_found(monkeypatch):
    at = Trace.state_at
    monkeypatch.setattr(
        Trace, "state_at", lambda self, places: replace(at(self, places), lengths=at(self, places).lengths + 1)
    )
    found = parity(make_policy(), prefixes=(1, 64))
    assert wrong(found) == {"state"} and found.rows[0].where == "lengths"


def test_a_final_state_taken_behind_the_pads_is_found(monkeypatch):
    last = property(lambda self: replace(self, lengths=torch.full_like(self.lengths, self.hidden_states.shape[1])).state_at(
        torch.full((len(self.lengths), 1), self.hidden_states.shape[1] - 1)
    ))  # fmt: skip
    monkeypatch.setattr(Trace, "final_state", last)
    found = parity(make_policy(), prefixes=(1, 64))
    assert wrong(found) == {"hidden"}


def test_a_gradient_cut_at_the_state_is_found_with_its_parameter():
    cut = in_layer(0, lambda true, positions: {name: x.detach() for name, x in true(positions).items()})
    found = parity(with_fault(cut), prefixes=(1, 64))
    assert wrong(found) == {"gradient"}
    assert all(row.error > 0.1 and row.where.startswith("model.") for row in found.rows if row.quantity == "gradient")
    assert "gradient after 1 tokens (model." in found.sentence


@pytest.mark.parametrize("dtype, part", [(torch.float32, 1e-2), (torch.float64, 1e-6)])
def test_a_gradient_that_is_a_little_off_is_no_rounding(dtype, part):
    scaled = in_layer(
        0, lambda true, positions: {n: x + part * (x - x.detach()) for n, x in true(positions).items()}
    )  # the value stays as it is
    assert wrong(parity(with_fault(scaled, dtype), prefixes=(64,))) == {"gradient"}


def test_a_state_changed_in_place_is_found():
    def fault(trace: Trace, state: State | None) -> Trace:
        if state is not None:
            state.tensors["1.conv_state_v"].data += 1e-6
        return trace

    found = parity(with_fault(fault), prefixes=(1, 64))
    assert {"state", "gradient"} <= wrong(found)
    assert found.rows[0].where == "1.conv_state_v" and "changed in place" in str(found.rows[-1])


def test_branches_in_the_wrong_order_are_found(monkeypatch):
    monkeypatch.setattr(State, "repeat", lambda self, times: self.select([*range(self.rows)] * times))
    assert "logits" in wrong(parity(make_policy(), prefixes=(1, 2, 64)))


def test_a_pad_that_enters_is_found():
    def fault(trace: Trace, state: State | None) -> Trace:
        pads = torch.arange(trace.hidden_states.shape[1]) >= trace.lengths.unsqueeze(-1)
        entered = (trace.hidden_states * pads.unsqueeze(-1)).sum(1, keepdim=True)
        return replace(trace, hidden_states=trace.hidden_states + 1e-2 * entered)

    assert "hidden" in wrong(parity(with_fault(fault), prefixes=(3, 40)))


def test_what_is_not_a_number_does_not_hold():
    nothing = in_layer(1, lambda true, positions: {name: x * torch.nan for name, x in true(positions).items()})
    found = parity(with_fault(nothing), prefixes=(2,))
    assert {"hidden", "logits", "decoded", "gradient"} <= wrong(found)
    assert found.layer == "model.layers.1"


def test_a_decoding_step_that_is_wrong_changes_the_greedy_continuation():
    def fault(trace: Trace, state: State | None) -> Trace:
        late = trace.hidden_states.shape[1] == 1 and state is not None
        return replace(trace, hidden_states=-trace.hidden_states) if late else trace

    assert wrong(parity(with_fault(fault), prefixes=(2,))) == {"decoded", "greedy"}


# -- what it leaves alone, tolerances, input ---------------------------------------------------------------------------


def test_it_leaves_the_model_as_it_was():
    policy = make_policy(torch.float32).train()
    policy.lm_head.weight.grad = torch.ones_like(policy.lm_head.weight)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with torch.no_grad():  # whatever the caller does
        first, again = (parity(policy, prefixes=(1, 64)) for _ in range(2))
    assert first == again and first.holds
    assert policy.training and torch.equal(policy.lm_head.weight.grad, torch.ones_like(policy.lm_head.weight))
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    assert [p.grad for p in policy.parameters() if p is not policy.lm_head.weight] == [None] * (len(before) - 1)
    assert not any(module._forward_hooks for module in policy.modules())


def test_lower_precision_has_its_own_tolerances():
    found = parity(make_policy(torch.float32), prefixes=(1, 64), autocast="bfloat16")
    assert found.holds and "bfloat16" in found.subject
    assert max(row.error for row in found.rows) > 1e-4, "bfloat16 it was"


def test_default_prefixes_stand_around_the_borders_of_chunk_and_window():
    assert default_prefixes(make_policy()) == [1, 2, 62, 64, 65, 129]
    assert default_prefixes(make("lact", torch.float32)) == [1, 2, 46, 48, 49, 62, 64, 65, 126, 128, 129]


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"prefixes": (0, 5)}, ["prefixes", [0, 5]]),
        ({"prefixes": ()}, ["prefixes", []]),
        ({"prefixes": (True, 5)}, ["prefixes", [True, 5]]),
        ({"rollout_length": 0}, ["rollout_length", 0]),
        ({"autocast": "float8_e5m2"}, ["bfloat16", "float8_e5m2"]),
    ],
)
def test_bad_input_is_refused_in_a_sentence(settings, facts):
    with naming(ValueError, *facts):
        parity(make_policy(), **settings)


def test_a_model_without_parameters_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        parity(make_policy().requires_grad_(False))


# -- how it is called --------------------------------------------------------------------------------------------------


def test_the_package_gives_the_gate_whether_or_not_its_module_was_imported():
    code = "import refine_lab; gate = refine_lab.parity; import refine_lab.parity as module; print(callable(gate))"
    code += "; print(callable(module), module.parity.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "parity"], done.stderr
    assert refine_lab.parity(make_policy(), prefixes=(1,)).holds


def test_the_model_of_a_run_is_held_in_the_runs_arithmetic(monkeypatch):
    monkeypatch.setattr("refine_lab.parity.gate.default_prefixes", lambda model: [1, 2])
    found = parity_of(replace(midtrain("sft"), dtype="bfloat16", device="cpu"))
    assert found.holds and "bfloat16" in found.subject


def test_the_table_marks_what_fails():
    table = str(parity(with_fault(in_layer(1, one_token_late("recurrent_state"))), prefixes=(2, 64))).splitlines()
    assert table[0].split() == ["prefix", "state", "hidden", "logits", "decoded", "greedy", "gradient"]
    assert [line.split()[0] for line in table[1:-1]] == ["2", "3", "64", "allowed"]
    assert (
        "!" in table[1]
        and "!" not in table[-2]
        and table[-1].startswith("parity fails for DeltaNetForCausalLM in float32")
    )


def test_exit_statuses(capsys, monkeypatch):
    monkeypatch.setattr("refine_lab.parity.__main__.quiet", lambda: None)
    assert main(["tiny-deltanet", "--prefixes", "1,2", "--device", "cpu"]) == 0
    assert "parity holds for DeltaNetForCausalLM in float32 on cpu" in capsys.readouterr().out
    for arguments in (["no-such-model"], ["tiny-deltanet", "--prefixes", "1,x"], ["tiny-deltanet", "--prefixes", "0"]):
        assert main([*arguments, "--device", "cpu"]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1, "one sentence"
    late = with_fault(in_layer(1, one_token_late("recurrent_state")))
    monkeypatch.setattr("refine_lab.parity.__main__.load_model", lambda *_, **__: (late, None))
    assert main(["late"]) == 1
    assert "parity fails" in capsys.readouterr().out
