"""What the service reads and writes, as pydantic models: validation and OpenAPI are made of them.

Requests are read strictly (no `"5"` for 5) and with limits on counts, so that one of them cannot
take the device for itself. Keys that a model does not name are passed over, because records and
OpenAI's clients have many; only `settings`, which is ours, refuses them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_RESPONSES = 64
MAX_SAMPLES = 128
MAX_NEW_TOKENS = 4096
MAX_MESSAGES = 1024
MAX_QUERIES = 1024
SEEDS = 2**32


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Turn(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class JudgeSettings(_Strict):
    """How to judge; what is left out is as the server was started."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    orders: Literal["shuffle", "balanced", "fixed"] | None = None
    constrain: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None


class JudgeBody(_Strict):
    """A comparison. A label and other keys may be there and are not read."""

    id: Annotated[str, Field(min_length=1)] | int | None = Field(
        None, description="Comes back with the judgement, and decides its samples with the seed."
    )
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    responses: Annotated[list[str], Field(min_length=1, max_length=MAX_RESPONSES)]
    settings: JudgeSettings | None = None


class SampleOut(BaseModel):
    """One sampled judgement."""

    order: list[int]
    scores: list[float] | None
    meta: float | None
    text: str
    finish: Literal["stop", "length"]


class UsageOut(BaseModel):
    """What a judgement took."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float


class JudgementOut(BaseModel):
    """The vote; `error` takes its place where a record cannot be judged."""

    id: str
    scores: list[float] | None = None
    ranking: list[int] | None = None
    best: int | None = None
    tied: list[int] | None = None
    error: str | None = None
    valid_samples: int
    samples: list[SampleOut]
    usage: UsageOut


class RewardBody(_Strict):
    """OpenRLHF's request: whole texts, and the prompts that they begin with."""

    query: Annotated[list[str], Field(max_length=MAX_QUERIES)]
    prompts: Annotated[list[str], Field(max_length=MAX_QUERIES)] | None = None
    labels: Annotated[list[Any], Field(max_length=MAX_QUERIES)] | None = None


class RewardOut(BaseModel):
    """OpenRLHF's answer."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class ContentPart(_Strict):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class ChatTurn(_Strict):
    """A turn as OpenAI's clients write it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]


Chat = Annotated[list[ChatTurn], Field(min_length=1, max_length=MAX_MESSAGES)]


class ClassifyBody(_Strict):
    """vLLM's request: a text, or several, each a prompt in chat markup with its answer."""

    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_QUERIES)]
    activation: bool | None = Field(None, description="False: points in place of 0 to 1.")
    use_activation: bool | None = Field(None, description="The same, by its newer name.")


class ClassifyItem(BaseModel):
    """The scalar of one text, as the probability of its only class."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class TokensOut(BaseModel):
    """Tokens, as OpenAI's clients count them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ClassifyTokensOut(TokensOut):
    """Tokens, as vLLM counts them."""

    prompt_tokens_details: None


class ClassifyOut(BaseModel):
    """vLLM's answer."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifyItem]
    usage: ClassifyTokensOut


class ChatBody(_Strict):
    """OpenAI's request; what is not named here has no effect."""

    model: str | None = None
    messages: Chat
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    stream: Literal[False] | None = Field(None, description="Answers come whole.")


class AnswerOut(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str


class ChoiceOut(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerOut
    finish_reason: Literal["stop", "length"]


class ChatOut(BaseModel):
    """OpenAI's answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChoiceOut]
    usage: TokensOut


class ModelOut(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsOut(BaseModel):
    """The list of the one model."""

    object: Literal["list"]
    data: list[ModelOut]


class HealthOut(BaseModel):
    """How the service is."""

    status: Literal["ok", "draining"]
    waiting: int


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    code: int


class ErrorOut(BaseModel):
    """An answer that is no result."""

    error: ErrorDetail
