"""The judge as a reward function of Tunix and of MaxText, which trains with it.

    from grm_jax.adapters import Scorer, tunix
    learner = GRPOLearner(cluster, algo_config, reward_fns=tunix.reward_fn(Scorer(judge=grm)))

For MaxText, put `reward = tunix.maxtext_reward(Scorer(...))` in a file of your own and name the
file as `reward_functions_path` and `reward` among `reward_functions`.
"""

from grm_jax.adapters.columns import Columns, RewardFunc, column_reward
from grm_jax.adapters.scoring import Scorer


def reward_fn(scorer: Scorer, *, columns: Columns | None = None, name: str = "grm") -> RewardFunc:
    """A reward function for Tunix's `reward_fns`.

    Args:
      scorer: Rates the completions.
      columns: Which columns of the data set say more about a prompt.
      name: What the reward is called in logs.

    Raises:
      UsageError: If the scorer may return None, which Tunix would count as 0.
    """
    return column_reward(scorer, "Tunix", columns=columns, name=name)


def maxtext_reward(
    scorer: Scorer, *, columns: Columns | None = None, name: str = "grm"
) -> RewardFunc:
    """As `reward_fn`, for MaxText's `reward_functions`, which are given its configuration too."""
    return column_reward(scorer, "MaxText", columns=columns, name=name)
