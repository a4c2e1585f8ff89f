"""`meditron-train generate`: text from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Hugging Face directory, sharded checkpoint or run directory."),
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample among tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a prompt; prints the prompt and its continuation.

    Of a run, its newest checkpoint is asked, or the export of it (RUN_DIR/hf).

    \b
    Examples:
      meditron-train generate runs/llama2-7b --prompt "Metformin is"
      meditron-train generate models/Llama-2-7b-hf --prompt "Q:" --temperature 1
    """
    import torch

    from meditron_train.evaluate.generate import check_sampling, generate_text
    from meditron_train.evaluate.language_model import as_hf_directory, choose_device, load_language_model
    from meditron_train.flows.run_model import model_of_run

    check_sampling(max_new_tokens, temperature, top_p, seed)  # before a large model is read
    device = choose_device(device)
    with as_hf_directory(model_of_run(model)) as directory:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        language_model = load_language_model(directory, dtype=dtype, device=device)
    text = generate_text(
        language_model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    print(prompt + text)
