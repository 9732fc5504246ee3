"""GRPO with TRL's trainer on a tiny policy, with a judge as the only reward.

    pip install 'grm_jax[peers]' && python -m examples.trl_grpo            # a rule judges: seconds
    python -m examples.trl_grpo --model smollm2-135m --steps 3             # a real judge: minutes

The policy is a transformer of random weights over digits, so it learns from the reward or not at
all. Without a model, the judge is a rule in the place of one, which gives an answer a point for
each 7 in it: it shows that what the judge likes is what the policy comes to write. The reward by
step is printed; the true score is the share of 7 among all digits.
"""

import tempfile
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from examples.sevens import DIGITS, main, true_score
from grm_jax.adapters import Scorer, trl
from grm_jax.adapters.scoring import Judge


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each digit."""
    vocabulary = {char: index for index, char in enumerate([*DIGITS, "<pad>", "<eos>", "?"])}
    engine = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=engine, pad_token="<pad>", eos_token="<eos>", unk_token="?"
    )


def tiny_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A transformer of random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None, tie_word_embeddings=True,
        )
    )  # fmt: skip


def held_out(trainer: GRPOTrainer, tokenizer: PreTrainedTokenizerFast, count: int = 64) -> float:
    """The true score of what the policy writes to questions that it was not trained on."""
    questions = [f"{number:03}" for number in range(900, 900 + count)]
    batch = tokenizer(questions, return_tensors="pt", return_token_type_ids=False)
    out = trainer.model.generate(**batch, max_new_tokens=8, do_sample=True, top_k=0)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
    return true_score(answers)


def train(
    judge: Judge, *, steps: int, seed: int = 0, **settings: Any
) -> tuple[list[float], float, float]:
    """Trains a policy by a judge.

    Args:
      judge: What is asked for rewards.
      steps: Updates.
      seed: Of weights and samples.
      **settings: Of the judge.

    Returns:
      The mean reward by step, and the held-out true score before and after.
    """
    set_seed(seed)
    tokenizer = digit_tokenizer()
    reward = trl.reward_func(Scorer(judge=judge, unreadable="none", settings=settings))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=tiny_policy(tokenizer),
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [f"{n:03}" for n in range(256)]}),
            args=GRPOConfig(
                output_dir=folder, max_steps=steps, learning_rate=1e-2, num_generations=8,
                per_device_train_batch_size=32, max_completion_length=8, beta=0.0, seed=seed,
                logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
                disable_tqdm=True, gradient_checkpointing=False,
            ),
        )  # fmt: skip
        before = held_out(trainer, tokenizer)
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        return rewards, before, held_out(trainer, tokenizer)


if __name__ == "__main__":
    main(train, "GRPO by TRL with a judge as the reward.")
