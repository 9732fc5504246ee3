"""What `benchmarks/gpu.py` measures of `transformers`, on the same shapes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from benchmarks.gpu import Bench


def peer(bench: "Bench", section: str, name: str, *, lora: int) -> None:
    """Reading prompts, `generate` and a training step.

    Only eager attention has soft caps. All parameters learn in bfloat16, of which the optimiser
    moves half the bytes that float32 would take.
    """
    s, cuda = bench.sizes, torch.cuda.is_available()
    bench.keep("machine", torch=torch.__version__, transformers=transformers.__version__)
    kind = "eager" if name.startswith("Gemma") else "sdpa"
    shape = bench.shape(name)
    config: Any = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("cuda" if cuda else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=kind
        )
        tokens = torch.randint(3, config.vocab_size, (s.prompts, s.prompt))
        rows = torch.randint(3, config.vocab_size, (s.rows, s.length))
    model.eval()
    model.generation_config.eos_token_id = None

    def keep(part: str, what: str, count: int, run: Callable[[], object], repeats: int) -> None:
        def waited() -> None:
            run()
            if cuda:
                torch.cuda.synchronize()

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        taken = bench.time(waited, repeats)
        gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        bench.keep(f"{section}, {part}", what=f"{what}, {kind}", tokens=count, gib=gib, **taken)

    some = tokens[: s.peer_prompts]

    def generate() -> Any:
        return model.generate(
            some,
            attention_mask=torch.ones_like(some),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=s.samples,
            max_new_tokens=s.new,
            pad_token_id=0,
        )

    with torch.inference_mode():
        what = f"{s.prompts} prompts of {s.prompt} tokens"
        keep("prefill", what, tokens.numel(), lambda: model.model(tokens, use_cache=True), 5)
        what = f"{s.peer_prompts} x {s.samples} samples of {s.new} tokens, prompts and all"
        keep("generate", what, s.peer_prompts * s.samples * s.new, generate, 2)
        assert bench.quick is False or generate().shape[1] == s.prompt + s.new
    bench.check()
    how = "all parameters, kept in bfloat16"
    if lora:
        from peft import LoraConfig, get_peft_model

        how = f"adapters of rank {lora}"
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
    model.gradient_checkpointing_enable()
    model.train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, fused=cuda)

    def learn() -> None:
        model(rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    keep("train", f"{s.rows} rows of {s.length} tokens, {how}", rows.numel(), learn, 3)
