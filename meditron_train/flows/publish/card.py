"""The model card: README.md of a repository on the Hugging Face Hub, written from what the run has recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

import meditron_train
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.evaluate.harness.compare import compare, describe_protocol
from meditron_train.flows.publish.check import Check
from meditron_train.flows.publish.facts import RunFacts, Work
from meditron_train.flows.publish.licenses import CODE_LICENSE_NAME, LICENSE_NAME, NOTICE_NAME, License

_UNKNOWN = "not recorded"

# In the spirit of the notice that Meditron was released with, in our own words.
_SAFETY = """\
**This is a research model, not a medical device. Do not use it in the care of patients, and let nobody decide about
their health by what it says.**

It writes what is likely after medical text, which may be wrong, outdated, invented, or harmful, in a tone that sounds
certain. It knows no patient. It has not been shown to be safe or useful in any clinical setting, and a score on exam
questions does not show it. Before any use near patients it needs at least

- alignment with what it is to be used for, and tests of that use by clinicians, with the population and language in
  question,
- randomized controlled trials or an equal standard of evidence, and whatever the law asks of medical software,
- a person who is qualified, sees every answer and is responsible for what follows from it.

### Intended use

- Research on medical language models: evaluation, interpretation, further training, comparison of methods.
- A base for models that are finetuned, aligned and validated for one purpose.

### Not intended

- Diagnosis, treatment, triage, dosing, or advice to patients or the public, with or without a disclaimer.
- Anything that acts on its answers without a qualified person in between.
- Processing personal health data where the law does not allow it.

### Known limits

- Bias: medical literature over-represents some populations, languages and countries, and the model repeats this.
- Facts stop at the date of the training text; retracted or superseded work may be among it.
- Pretraining is not alignment: it does not refuse, and can be led to harmful or private content.
- Answers in languages other than those of the training text have not been tested.
"""


@dataclass(frozen=True)
class Card:
    """What the card is about.

    Attributes:
        base: how the model that it was made from is called.
        base_model: its id on the Hub.
        facts: None where the training is not known.
        merge: what the manifest says of a merged model's parents.
    """

    name: str
    model: ModelConfig
    license: License
    license_is_known: bool
    base: str
    base_model: str | None
    repo: str | None
    facts: RunFacts | None
    merge: dict[str, Any] | None
    evaluations: Sequence[dict[str, Any]]
    check: Check
    public_key_sha256: str | None
    has_chat_template: bool
    pue: float
    carbon_kg_per_kwh: float


def model_card(card: Card) -> str:
    """README.md with the front matter that the Hub reads."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)}---\n",
        f"# {card.name}\n",
        _summary(card),
        f"## Safety and intended use\n\n{_SAFETY}",
        _use(card),
    ]
    if card.merge is not None:
        parts.append(_merge(card.merge))
    if card.facts is not None:
        parts += [_data(card.facts), _training(card.facts), _footprint(card, card.facts.work)]
    else:
        parts.append(
            "## Training\n\nThe record of the training run was not at hand when this card was written.\n"
        )
    parts += [_evaluation(card), _provenance(card), _license(card)]
    return "\n".join(parts)


def _front_matter(card: Card) -> dict[str, Any]:
    header: dict[str, Any] = {"license": card.license.hub_id}
    if not card.license_is_known:
        header |= {"license_name": card.license.title, "license_link": LICENSE_NAME}
    header |= {
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["medical", "meditron-train", *(["merge"] if card.merge is not None else [])],
    }
    if card.base_model:
        header["base_model"] = card.base_model
    results = [result for evaluation in card.evaluations for result in _index(evaluation)]
    if results:
        header["model-index"] = [{"name": card.name, "results": results}]
    return header


def _index(evaluation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of the Hub's table; a part of the questions gives none, as nobody sees there that it is one."""
    for score in evaluation["scores"] if evaluation.get("limit") is None else ():
        if score["accuracy"] is not None:
            yield {
                "task": {"type": "text-generation"},
                "dataset": {"name": score["title"], "type": score["benchmark"]},
                "metrics": [
                    {
                        "type": "accuracy",
                        "value": round(score["accuracy"], 4),
                        "name": describe_protocol(score["protocol"]),
                    }
                ],
            }


def _summary(card: Card) -> str:
    model, facts = card.model, card.facts
    if card.merge is not None:
        origin = "the weighted average of several checkpoints"
    elif facts is not None and facts.config.model.init == "random":
        origin = "pretrained from random weights"
    else:
        origin = f"{card.base} after {_kind(facts.config)}" if facts is not None else f"made from {card.base}"
    tokens = (
        f" on {facts.tokens:,} tokens" if facts is not None and facts.tokens and card.merge is None else ""
    )
    kv = f" ({model.num_kv_heads} for keys and values)" if model.num_kv_heads != model.num_heads else ""
    return (
        f"{model.num_parameters:,} parameters, {origin}{tokens}, with meditron-train {meditron_train.__version__}.\n\n"
        f"Architecture: {model.family}, {model.num_layers} layers, hidden size {model.hidden_size}, {model.num_heads} "
        f"heads{kv}, feed-forward {model.intermediate_size}, vocabulary {model.vocab_size:,}, up to "
        f"{model.max_position_embeddings:,} tokens, stored in {model.dtype}.\n"
    )


def _kind(config: Config) -> str:
    kind = "continued pretraining" if config.data.chat is None else "supervised finetuning"
    return kind if config.lora is None else f"{kind} with LoRA"


def _use(card: Card) -> str:
    place = card.repo or card.name
    chat = (
        "Its tokenizer has a chat template: `tokenizer.apply_chat_template`.\n"
        if card.has_chat_template
        else "It has no chat template: it continues text, and was not trained to follow instructions in a dialogue.\n"
    )
    return (
        "## How to use it\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")\n'
        'inputs = tokenizer("Metformin is", return_tensors="pt")\n'
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```\n\n{chat}"
    )


def _merge(merge: dict[str, Any]) -> str:
    rows = [
        (
            f"{parent['weight']:.6g}",
            _last_part(parent.get("path")),
            parent.get("step", ""),
            _parent_hash(parent),
        )
        for parent in merge.get("parents") or ()
    ]
    return (
        f"## Merge\n\nAverage of these checkpoints (`{merge.get('weights')}`), summed in float64 and rounded once to "
        f"float32:\n\n{_table(('weight', 'checkpoint', 'step', 'SHA-256 of its manifest or weights'), rows)}"
    )


def _last_part(path: Any) -> str:
    return str(path).rstrip("/").rpartition("/")[2]


def _parent_hash(parent: dict[str, Any]) -> str:
    files = parent.get("files") or {}
    weights = [digest for name, digest in files.items() if name.endswith((".safetensors", ".bin"))]
    return "`" + "` `".join([parent["manifest_sha256"]] if "manifest_sha256" in parent else weights) + "`"


def _data(facts: RunFacts) -> str:
    rows = [
        (source.name, source.share, _number(source.documents), _number(source.tokens),
         ", ".join(source.licenses) or _UNKNOWN, source.corpus or _UNKNOWN)
        for source in facts.data
    ]  # fmt: skip
    trained = (
        "How many tokens were trained on is not recorded."
        if facts.tokens is None
        else f"{facts.tokens:,} tokens were trained on, padding included."
    )
    header = ("source", "share", "documents", "tokens", "licenses that documents state", "corpus")
    return (
        f"## Training data\n\n{_table(header, rows)}\n"
        f"Packing: {facts.config.data.packing}; documents in one sequence do not see each other. "
        f"{trained}\n"
    )


def _training(facts: RunFacts) -> str:
    return f"## Training\n\n{_table(('', ''), list(_settings(facts.config, facts)))}"


def _settings(config: Config, facts: RunFacts) -> Iterator[tuple[str, str]]:
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    yield "steps", f"{facts.step:,} of {train.steps:,}"
    yield "global batch", f"{train.global_batch_size:,} sequences of {train.seq_len:,} tokens"
    yield (
        "optimizer",
        f"AdamW, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, epsilon {optimizer.eps:g}, weight decay "
        f"{optimizer.weight_decay:g}, gradient norm clipped at {optimizer.clip_grad:g}",
    )
    yield (
        "learning rate",
        f"{optimizer.lr:g}, {schedule.kind} to {optimizer.min_lr:g}, {config.warmup_steps:,} steps of warm-up",
    )
    yield (
        "precision",
        train.precision + (", fp32 master weights and gradients" if train.precision == "bf16" else ""),
    )
    yield "seed", f"{train.seed} (data order {config.data.seed})"
    if (chat := config.data.chat) is not None:
        yield "chat template", chat.template
        yield "loss on answers", f"weight 1; on other tokens of conversations {chat.prompt_loss_weight:g}"
        yield "tokens in the loss", _number(facts.learned_tokens)
    if (lora := config.lora) is not None:
        yield "LoRA", f"rank {lora.rank}, alpha {lora.scale * lora.rank:g}, dropout {lora.dropout:g}"
        yield "adapted matrices", ", ".join(lora.targets)
    if train.freeze.freezes_anything:
        yield "frozen", str(train.freeze.model_dump(exclude_defaults=True))
    layout = facts.layout
    sizes = ("tensor", "pipeline", "context", "data")
    yield (
        "parallel layout",
        " x ".join(f"{name} {getattr(layout, name)}" for name in sizes) if layout else _UNKNOWN,
    )
    for name, loss in facts.losses.items():
        yield f"last loss, {name}", f"{loss:.4f} nats per token"
    for name in ("torch", "megatron-core", "transformers"):
        if name in facts.versions:
            yield name, facts.versions[name]


def _footprint(card: Card, work: Work | None) -> str:
    heading = "## Hardware, energy and CO2\n\n"
    if work is None:
        return f"{heading}The record of the run was not at hand when this card was written.\n"
    is_cpu = work.gpu == "cpu"
    unit = "rank-hours" if is_cpu or work.gpu is None else "GPU-hours"
    rows = [
        ("hardware", f"{work.world_size or '?'} x {work.device or work.gpu or _UNKNOWN}"),
        (unit, f"{work.rank_seconds / 3600:,.4g}" if work.rank_seconds else _UNKNOWN),
        ("speed", f"{work.tokens_per_second:,.0f} tokens/s" if work.tokens_per_second else _UNKNOWN),
        ("MFU (6N per token)", f"{work.mfu:.1%}" if work.mfu else _UNKNOWN),
    ]
    cost = work.cost(card.pue, card.carbon_kg_per_kwh)
    if cost is None:
        note = "Energy and CO2 are not stated, as the hardware's power or the time is not known."
    else:
        rows += [("energy", f"{cost.energy_kwh:,.4g} kWh"), ("CO2", f"{cost.co2_kg:,.4g} kg")]
        limit = "assumed of a CPU rank" if is_cpu else "the board's limit, an upper bound"
        power = "the mean that NVML measured" if work.measured_power_w else limit
        note = (
            f"energy = {unit} x {cost.power_w:.0f} W ({power}) / 1000 x PUE {cost.pue:g}; CO2 = energy x "
            f"{cost.carbon_kg_per_kwh:g} kg/kWh."
        )
    return (
        f"{heading}{_table(('', ''), rows)}\n{note} Counted are all starts of this run, from start to last sign, also "
        "what was lost; earlier trials are not.\n"
    )


def _evaluation(card: Card) -> str:
    if not card.evaluations:
        return "## Evaluation\n\nNo evaluation was given when this card was written.\n"
    own = [{**evaluation, "model": card.name} for evaluation in card.evaluations]
    return f"## Evaluation\n\n95 % bootstrap intervals in brackets.\n\n{compare(own).markdown()}"


def _provenance(card: Card) -> str:
    check = card.check
    how = "from_pretrained and layer by layer" if check.is_loaded else "layer by layer"
    cast = f" after the cast to {check.cast}" if check.cast else ""
    lines = [
        "## Provenance\n",
        f"Before publication, all {check.num_tensors} tensors were compared with the checkpoint bit for bit{cast}, and "
        f"transformers {check.transformers} ({how}, float32) computed the checkpoint's logits within "
        f"{check.max_difference:.1e}; an independent implementation within {check.ours_max_difference:.1e} (largest "
        f"logit {check.largest:.3g}).\n",
        "`manifest.json` has the SHA-256 of every file and every tensor.\n",
    ]
    hashes = list(card.facts.hashes.items()) if card.facts is not None else []
    if hashes:
        lines.append(_table(("what", "SHA-256 or commit"), [(what, f"`{value}`") for what, value in hashes]))
    if card.public_key_sha256:
        lines.append(
            f"Signed with a key whose public half (DER) has the SHA-256 `{card.public_key_sha256}`. To check it, with "
            "the public key from a place that you trust: `model_signing verify key DIR --signature DIR/model.sig "
            "--public_key PUBLIC_KEY`.\n"
        )
    return "\n".join(lines)


def _license(card: Card) -> str:
    text = f" ([text]({card.license.url}))" if card.license.url else f" ({LICENSE_NAME})"
    sentence = f" {card.license.sentence}." if card.license.sentence else ""
    return (
        f"## License\n\nWeights: {card.license.title}{text}, as those of {card.base}.{sentence} {NOTICE_NAME} holds "
        f"what must be passed on with them. Code in this card: Apache License 2.0 ({CODE_LICENSE_NAME}).\n"
    )


def _number(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in cells) + "\n"


def _cell(value: Any) -> str:
    """Text from files of others stays within its cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
