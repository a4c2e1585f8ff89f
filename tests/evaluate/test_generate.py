"""Generated text against a loop without a cache."""

from __future__ import annotations

import pytest
import torch

from meditron_train.evaluate.generate import generate_text
from tests.refusal import refused

PROMPT = "kamori ten zupa"


def test_greedy_takes_the_likeliest_token_each_time(model):
    ids = model.tokenizer.encode(PROMPT)
    length = len(ids)
    for _ in range(12):
        token = int(model.logits(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
        if token == model.tokenizer.eos_token_id:
            break
    whole = model.tokenizer.decode(ids, skip_special_tokens=True)
    start = model.tokenizer.decode(ids[:length], skip_special_tokens=True)
    assert start == PROMPT
    assert generate_text(model, PROMPT, max_new_tokens=12) == whole[len(start) :]


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone(model):
    state = torch.get_rng_state()
    texts = [
        generate_text(model, PROMPT, max_new_tokens=16, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_narrow_nucleus_is_greedy(model):
    greedy = generate_text(model, PROMPT, max_new_tokens=8)
    assert generate_text(model, PROMPT, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


def test_it_stops_where_the_model_ends(model):
    room = model.max_num_tokens - len(model.tokenizer.encode(PROMPT))
    everything = generate_text(model, PROMPT, max_new_tokens=1000)
    assert everything == generate_text(model, PROMPT, max_new_tokens=room)
    assert everything != generate_text(model, PROMPT, max_new_tokens=room - 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range(model, arguments, said):
    with refused(said):
        generate_text(model, PROMPT, **arguments)


def test_a_prompt_without_room(model):
    with refused("at most 64"):
        generate_text(model, PROMPT * 40)
