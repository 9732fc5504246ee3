"""The judge as a reward function of EasyDeL's trainers.

from grm_jax.adapters import Scorer, easydel
trainer = GRPOTrainer(model=model, reward_funcs=easydel.reward_func(Scorer(judge=grm)), ...)
"""

from grm_jax.adapters.columns import Columns, RewardFunc, column_reward
from grm_jax.adapters.scoring import Scorer


def reward_func(scorer: Scorer, *, columns: Columns | None = None, name: str = "grm") -> RewardFunc:
    """A reward function for `reward_funcs`.

    Args:
      scorer: Rates the completions.
      columns: Which columns of the data set say more about a prompt.
      name: What the reward is called in logs.

    Raises:
      UsageError: If the scorer may return None, for which EasyDeL has no meaning.
    """
    return column_reward(scorer, "EasyDeL", columns=columns, name=name)
