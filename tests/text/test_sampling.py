"""Each sampling option against transformers', and the draw against its distribution."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rkf.errors import UsageError
from rkf.runtime.chooser import Chooser
from rkf.runtime.sampling import (
    Sampling,
    adjusted,
    candidates,
    choose,
    log_probabilities,
    penalised,
    sample,
    uniform,
)

RANDOM = np.random.Generator(np.random.Philox(key=1))
LOGITS = (3 * RANDOM.standard_normal(1000)).astype(np.float32)
FLAT = (0.01 * RANDOM.standard_normal(1000)).astype(np.float32)

CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
]


def theirs(logits, temperature, top_k=None, top_p=None, min_p=None):
    """transformers' probabilities over the whole vocabulary."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        steps.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        steps.append(MinPLogitsWarper(min_p))
    return torch.softmax(steps(None, torch.from_numpy(logits.astype(np.float64))[None]), -1)[0].numpy()


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("logits", [LOGITS, FLAT], ids=["peaked", "flat"])
def test_candidates_equal_transformers(logits, temperature, cuts):
    ids, probabilities = candidates(logits, Sampling(temperature=temperature, **cuts))
    ours = np.zeros(len(logits))
    ours[ids] = probabilities
    np.testing.assert_allclose(ours, theirs(logits, temperature, **cuts), rtol=1e-9, atol=1e-15)
    assert len(np.unique(ids)) == len(ids)


def test_penalty_equals_transformers_and_leaves_its_input():
    before, seen = LOGITS.copy(), [3, 7, 7, 999]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), torch.from_numpy(LOGITS)[None])[0].numpy()
    np.testing.assert_allclose(penalised(LOGITS, seen, 1.3), expected, rtol=1e-6)
    np.testing.assert_array_equal(LOGITS, before)


def test_penalty_acts_on_greedy_choice_too():
    best = int(np.argmax(LOGITS))
    assert sample(LOGITS, Sampling(), [best]) == best
    assert sample(LOGITS, Sampling(repetition_penalty=100.0), [best]) != best


def test_biases_and_penalties_of_the_answer():
    best, second = (int(i) for i in np.argsort(-LOGITS)[:2])
    assert sample(LOGITS, Sampling(logit_bias={best: -100.0})) == second
    assert sample(LOGITS, Sampling(logit_bias={7: 100.0})) == 7
    with pytest.raises(UsageError, match="logit_bias: expected token ids"):
        sample(LOGITS, Sampling(logit_bias={1000: 1.0}))
    ids = [best, 5, 5, 6]
    found = LOGITS - adjusted(LOGITS, Sampling(presence_penalty=0.5, frequency_penalty=0.25), ids, 1)
    assert {n: round(float(found[n]), 5) for n in np.flatnonzero(found)} == {5: 1.0, 6: 0.75}  # not the prompt's


def test_only_allowed_tokens_are_chosen():
    allowed = np.zeros(1000, bool)
    allowed[[3, 8]] = True
    best = 3 if LOGITS[3] > LOGITS[8] else 8
    assert sample(LOGITS, Sampling(), allowed=allowed) == best
    drawn = {sample(LOGITS, Sampling(temperature=5.0, top_k=50, seed=n), allowed=allowed) for n in range(60)}
    assert drawn == {3, 8}


def test_log_probabilities_are_the_models_own():
    wanted = torch.log_softmax(torch.from_numpy(LOGITS.astype(np.float64)), -1).numpy()
    np.testing.assert_allclose(log_probabilities(LOGITS), wanted, rtol=1e-12)
    chooser = Chooser(Sampling(logit_bias={9: 100.0}), 0, top_logprobs=2)
    assert chooser(LOGITS, []) == 9
    (told,) = chooser.logprobs
    assert (told.token, [token for token, _ in told.top]) == (9, np.argsort(-LOGITS)[:2].tolist())
    np.testing.assert_allclose([told.logprob, told.top[0][1]], [wanted[9], wanted.max()], rtol=1e-12)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_cut_is_greedy(cut):
    assert sample(LOGITS, Sampling(temperature=1.5, **cut), [1, 2]) == int(np.argmax(LOGITS))


def test_ties_go_to_the_lower_id():
    logits = np.zeros(10, np.float32)
    assert sample(logits, Sampling()) == 0
    ids, _ = candidates(logits, Sampling(temperature=1.0, top_k=3))
    assert ids.tolist() == [0, 1, 2]


def test_a_draw_depends_on_seed_and_position_alone():
    first = [sample(LOGITS, Sampling(temperature=1.0, seed=5), range(n)) for n in range(50)]
    again = [sample(LOGITS, Sampling(temperature=1.0, seed=5), range(n)) for n in reversed(range(50))]
    assert first == again[::-1]
    other = [sample(LOGITS, Sampling(temperature=1.0, seed=6), range(n)) for n in range(50)]
    assert first != other
    assert len(set(first)) > 10


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    drawn = [sample(logits, Sampling(temperature=1.0, seed=1), range(n)) for n in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.025)  # three standard errors


def test_uniform_is_pinned():
    """Golden values: a seed gives the same text in every later version."""
    assert [uniform(0, 0), uniform(0, 1), uniform(7, 0)] == [
        0.011546754286331562,
        0.5023796042735054,
        0.8720734548204873,
    ]
    assert all(0 <= uniform(3, position) < 1 for position in range(100))


@pytest.mark.parametrize(("point", "index"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.999999, 2)])
def test_choose_inverts_the_cumulative_distribution(point, index):
    assert choose(np.array([0.25, 0.25, 0.5]), point) == index


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {3: float("nan")}},
        {"seed": -1},
        {"seed": 1 << 64},
        {"temperature": "1"},
        {"top_k": 2.5},
        {"top_p": float("nan")},
        {"min_p": True},
        {"repetition_penalty": 1e-300},
        {"logit_bias": {3: 1e300}},
        {"logit_bias": {3: 10**400}},
        {"logit_bias": {"3": 1.0}},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name}: expected"):
        Sampling(**options)
