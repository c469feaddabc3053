"""Every environment variable of the job, in one place: name, type, default, bounds and meaning.

Parsing, the README's table, `entrypoint.py settings` and the manifests all follow the class below. This file imports
neither torch nor transformers, so a mistake is reported in well under a second.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "FT_"
STAGE_NAMES = ("preflight", "download", "prepare", "train", "publish_adapter", "sample", "merge", "export", "publish")


def _split(value: Any) -> Any:
    """Turn `a, b` from an environment variable into ("a", "b"). A JSON list works too."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _fraction_or_split(value: str | None) -> str | None:
    if value is not None and value.replace(".", "", 1).isdigit() and not 0 < float(value) < 1:
        raise ValueError("0, or 1 and more, would leave no rows on one side")
    if value is not None and (percent := re.fullmatch(r"([\d.]+)\s*%", value)) is not None:
        raise ValueError(f"write {percent[0]} as a fraction")
    if value is None or value.replace(".", "", 1).isdigit():
        return value
    whole_split(value)
    if re.fullmatch(r"\w[\w.-]*(\[[^\]]*\])?(\+\w[\w.-]*(\[[^\]]*\])?)*", value) is None or _is_number(value):
        raise ValueError("neither a fraction nor the name of a split")
    return value


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def whole_split(value: str) -> str:
    """A split as it is written, or ValueError."""
    if value.count("[") != value.count("]"):
        raise ValueError("write a part of a split as train[:100], train[100:200] or train[:10%]")
    return value


def _known_encoding(value: str) -> str:
    try:
        "row".encode(value).decode(value)  # refuses codecs that are no encodings of text, such as hex
        return codecs.lookup(value).name
    except (LookupError, UnicodeError):
        raise ValueError("Python knows no such encoding of text") from None


def _in_stage_order(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in STAGE_NAMES if name in value)


@dataclass(frozen=True)
class _Words:
    """What is allowed, for a setting whose type does not say it."""

    text: str


def _prices(value: Any) -> Any:
    """`2.9`, or `A100=1.5,H100=2.9`, or the same as a JSON object."""
    if not isinstance(value, str):
        return value
    try:
        if value.lstrip().startswith("{"):
            return _json(value)
        if "=" not in value:
            return {"": float(value)}
        pairs = (part.split("=") for part in value.split(",") if part.strip())
        return {name.strip(): float(price) for name, price in pairs}
    except ValueError as error:
        raise ValueError("not a number") from error


Auto = Literal["auto"]
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Stages = Annotated[
    tuple[
        Literal["preflight", "download", "prepare", "train", "publish_adapter", "sample", "merge", "export", "publish"],
        ...,
    ],
    NoDecode,
    BeforeValidator(lambda value: _split(value.lower() if isinstance(value, str) else value)),
    AfterValidator(_in_stage_order),
]
CommaFormats = Annotated[
    tuple[Literal["gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "fp8"], ...],
    NoDecode,
    BeforeValidator(lambda value: _split(value.lower() if isinstance(value, str) else value)),
]
Prompts = Annotated[tuple[Annotated[str, StringConstraints(min_length=1)], ...], NoDecode, BeforeValidator(_json)]
TextMap = Annotated[dict[str, str], NoDecode, BeforeValidator(_json)]
Encoding = Annotated[
    str, AfterValidator(_known_encoding), _Words("the name of an encoding, such as utf-8, utf-16, cp1252 or latin-1")
]
Separator = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1, pattern=r'^[^"\r\n]$'),
    _Words("a single character, such as ; or |"),
]
Price = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
Prices = Annotated[
    dict[str, Price],
    NoDecode,
    BeforeValidator(_prices),
    _Words("a number above 0, or such numbers by the names of GPUs, such as A100=1.5,H100=2.9"),
]
NumberMap = Annotated[dict[str, Annotated[int, Field(ge=1, le=65536)]], NoDecode, BeforeValidator(_json)]
JsonObject = Annotated[dict[str, Any], NoDecode, BeforeValidator(_json)]
NonEmpty = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
RunId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"),
    _Words("at most 128 letters, digits, dots, dashes and underscores, the first a letter or digit"),
]
DatasetSplit = Annotated[
    NonEmpty,
    AfterValidator(whole_split),
    _Words("the name of a split, such as train, or a part of it, such as train[:100]"),
]
EvalSplit = Annotated[
    NonEmpty,
    AfterValidator(_fraction_or_split),
    _Words("a fraction between 0 and 1, such as 0.05, or the name of a split, such as test"),
]


def _setting(default: Any, meaning: str, *, since: str | None, **bounds: Any) -> Any:
    """Declare a setting. `since` is the first stage whose result depends on it, or None if no result does."""
    return Field(default, description=meaning, json_schema_extra={"since": since}, **bounds)


def _choices(annotation: Any) -> dict[str, str]:
    """The words that a setting's type allows, by their lower-case form."""
    if typing.get_origin(annotation) is Literal:
        return {word.lower(): word for word in typing.get_args(annotation) if isinstance(word, str)}
    return {word: meant for part in typing.get_args(annotation) for word, meant in _choices(part).items()}


class Settings(BaseSettings):
    """The parsed environment. Build it with `job.environment.load_settings`, which explains every mistake."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _in_any_case(cls, values: Any) -> Any:
        """`BF16` means `bf16`: a choice from a list may be written in any case."""
        if isinstance(values, dict):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                if field is not None and isinstance(value, str):
                    values[name] = _choices(field.annotation).get(value.strip().lower(), value)
        return values

    # -- what to train, on what ---------------------------------------------------------------------------------
    model_name: NonEmpty = _setting(
        "NousResearch/Llama-2-7b-chat-hf",
        "Base model: a Hub id, `id@revision`, a local folder or an `s3://` prefix. Safetensors only.",
        since="download",
    )
    dataset_name: NonEmpty = _setting(
        "mlabonne/guanaco-llama2-1k",
        "Training data: a Hub id, `id@revision`, a local file or folder, or an `s3://` prefix. Several, separated by commas, are mixed: `id@revision:config:split*weight`, or a JSON list.",
        since="download",
    )
    dataset_config: NonEmpty | None = _setting(
        None, "Configuration to use, for Hub datasets with more than one.", since="download"
    )
    dataset_split: DatasetSplit = _setting(
        "train", "Split to train on. Slices such as `train[:1000]` work.", since="prepare"
    )
    dataset_format: Literal[
        "auto", "text", "messages", "prompt_completion", "alpaca", "dolly", "question_answer", "human_assistant", "llama2", "oasst", "oasst_trees", "chosen", "kto"
    ] = _setting(
        "auto",
        "Row format. `auto` detects it from the columns and the first rows. `chosen`, `kto` and `llama2` are used only if they are set.",
        since="prepare",
    )  # fmt: skip
    dataset_text_field: NonEmpty = _setting(
        "text", "Column that holds the text in `text`, `human_assistant` and `llama2` rows.", since="prepare"
    )
    dataset_columns: TextMap = _setting(
        {},
        'What the columns are, as a JSON object: `{"question": "ask", "answer": "reply"}` reads the columns `ask` and `reply`.',
        since="prepare",
    )
    dataset_roles: TextMap = _setting(
        {},
        'What unusual roles mean, as a JSON object: `{"customer": "user", "agent": "assistant"}`.',
        since="prepare",
    )
    dataset_encoding: Encoding | None = _setting(
        None,
        "Text encoding of JSON, CSV and text files, such as `cp1252`. Unset: UTF-8, or what the file shows.",
        since="prepare",
    )
    dataset_separator: Separator | None = _setting(
        None,
        "Character between the columns of CSV files. Unset: comma, semicolon, tab or bar, by the first line.",
        since="prepare",
    )
    dataset_sample: int | None = _setting(
        None, "Train on this many rows, drawn at random with `FT_SEED`. Unset: on all.", since="prepare", ge=1
    )
    deduplicate: bool = _setting(
        False, "Leave out training rows whose tokens are those of an earlier row.", since="prepare"
    )
    eval_dataset_name: NonEmpty | None = _setting(
        None, "Evaluation dataset, if it is not the training dataset.", since="download"
    )
    eval_split: EvalSplit | None = _setting(
        None,
        "Evaluation data: a split such as `test` or `train[:100]`, or a fraction of the training data to hold out, such as `0.05`.",
        since="prepare",
    )
    adapter_name: NonEmpty | None = _setting(
        None,
        "Adapter to go on from: a Hub id, `id@revision`, a local folder or an `s3://` prefix, or what this job published. Without `train` in `FT_STAGES` it is only merged and published.",
        since="download",
    )
    new_model: NonEmpty = _setting(
        "auto",
        "Name of the fine-tuned model. `auto` joins the names of the base model and the dataset.",
        since="publish",
    )
    chat_template: NonEmpty = _setting(
        "auto",
        "Chat template: `auto` (the tokenizer's own, else `llama-2`), `llama-2`, `chatml`, or a Jinja file.",
        since="prepare",
    )
    system_prompt: NonEmpty | None = _setting(None, "System prompt for conversations that have none.", since="prepare")
    system_role: Literal["keep", "fold", "drop"] = _setting(
        "keep",
        "System prompts of conversations: keep them, fold them into the user's first message, or drop them.",
        since="prepare",
    )
    ignored_message_keys: CommaList = _setting(
        (),
        "Keys of messages to leave out, such as `reasoning_content,name`. A key that the chat template would leave out is an error otherwise.",
        since="prepare",
    )
    train_on: Literal["auto", "all", "assistant", "last"] = _setting(
        "auto",
        "Tokens that are learned: all, the assistant's, or only its last answer. `auto` is all of `text` rows, the completion of `prompt_completion` rows, and the assistant's part of conversations.",
        since="prepare",
    )
    max_seq_length: Auto | Annotated[int, Field(ge=8, le=1_048_576)] = _setting(
        "auto",
        "Maximum tokens per row. `auto` is 1024, or the model's limit if that is lower.",
        since="prepare",
    )
    too_long: Literal["auto", "cut", "cut_left", "drop", "split"] = _setting(
        "auto",
        "Rows longer than that: cut their end, cut their beginning, drop them, or split them. `auto` cuts the end, and refuses data of which more than half would be cut.",
        since="prepare",
    )
    bad_rows: Literal["auto", "drop", "fail"] = _setting(
        "auto",
        "Rows that cannot be used: `drop` leaves them out, `fail` ends the job at the first. `auto` leaves out rows that do not fit the format, and ends the job for a broken file or what the chat template would leave out.",
        since="prepare",
    )
    max_bad_rows: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _setting(
        0.1, "Most rows that may be left out: a fraction below 1, or a number of rows.", since="prepare"
    )
    packing: bool = _setting(
        False,
        "Pack several short rows into one full-length row. Packed rows do not attend to each other.",
        since="prepare",
    )
    new_tokens: CommaList = _setting(
        (),
        "Tokens to add to the vocabulary, such as `<call>,</call>`. Their rows in embedding and head are trained with the adapter.",
        since="prepare",
    )
    completion_only_loss: bool = _setting(
        True, "Train only on the completions of prompt/completion rows. `FT_TRAIN_ON` overrides it.", since="prepare"
    )
    assistant_only_loss: Auto | bool = _setting(
        "auto",
        "Earlier name of a choice of `FT_TRAIN_ON`: `true` is `assistant`, `false` is `all` for conversations.",
        since="prepare",
    )

    # -- the adapter --------------------------------------------------------------------------------------------
    lora_r: int = _setting(64, "LoRA rank.", since="train", ge=1, le=4096)
    lora_alpha: int = _setting(
        16, "LoRA alpha. The adapter's output is scaled by alpha / r.", since="train", ge=1, le=65536
    )
    lora_dropout: float = _setting(0.1, "Dropout on the adapter's input.", since="train", ge=0, lt=1)
    lora_target_modules: Auto | Literal["all-linear"] | CommaList = _setting(
        "auto",
        "Layers to adapt: `auto` (peft's default, q_proj and v_proj for Llama), `all-linear`, or a list of names.",
        since="train",
    )

    use_rslora: bool = _setting(
        False, "Scale the adapter's output by alpha / √r instead of alpha / r (rsLoRA).", since="train"
    )
    use_dora: bool = _setting(
        False, "Train the length of each weight's rows apart from their direction (DoRA).", since="train"
    )
    lora_rank_pattern: NumberMap = _setting(
        {}, 'Other ranks for some layers, as a JSON object: `{"down_proj": 128}`.', since="train"
    )
    lora_alpha_pattern: NumberMap = _setting(
        {}, 'Other alphas for some layers, as a JSON object: `{"down_proj": 32}`.', since="train"
    )
    modules_to_save: CommaList = _setting(
        (),
        "Layers to train in full beside the adapter, such as `lm_head,embed_tokens`. Only layers that are not in 4 bits.",
        since="train",
    )

    # -- the base model's precision -----------------------------------------------------------------------------
    use_4bit: bool = _setting(True, "Quantize the frozen base model to 4 bits (QLoRA).", since="train")
    bnb_4bit_compute_dtype: Literal["auto", "float16", "bfloat16", "float32"] = _setting(
        "auto",
        "Data type of matrix products. `auto` is bfloat16, float16 on GPUs without bfloat16, and float32 on the CPU.",
        since="train",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _setting("nf4", "4-bit data type.", since="train")
    use_nested_quant: bool = _setting(
        False, "Quantize the quantization constants too (double quantization).", since="train"
    )
    fp16: Auto | bool = _setting(
        "auto", "float16 mixed precision. `auto` follows `FT_BNB_4BIT_COMPUTE_DTYPE`.", since="train"
    )
    bf16: Auto | bool = _setting(
        "auto", "bfloat16 mixed precision. `auto` follows `FT_BNB_4BIT_COMPUTE_DTYPE`.", since="train"
    )

    # -- training -----------------------------------------------------------------------------------------------
    num_train_epochs: float = _setting(1, "Passes over the training data.", since="train", gt=0, le=10_000)
    max_steps: int | None = _setting(
        None, "Optimizer steps to take. Overrides `FT_NUM_TRAIN_EPOCHS`.", since="train", ge=1
    )
    per_device_train_batch_size: int = _setting(
        4, "Rows per training batch on each GPU.", since="train", ge=1, le=65536
    )
    per_device_eval_batch_size: int = _setting(
        4, "Rows per evaluation batch on each GPU.", since="train", ge=1, le=65536
    )
    gradient_accumulation_steps: int = _setting(1, "Batches per optimizer step.", since="train", ge=1, le=65536)
    gradient_checkpointing: Auto | bool = _setting(
        "auto",
        "Recompute activations in the backward pass to save memory: in all layers, in none, or (`auto`) in as many as needed.",
        since=None,
    )
    keep_kernels: bool = _setting(
        True,
        "Keep compiled GPU kernels in the store, and use those that are there. `false` if others write to it.",
        since=None,
    )
    recomputed_layers: Auto | Annotated[int, Field(ge=0)] = _setting(
        "auto",
        "Number of layers that recompute activations when `FT_GRADIENT_CHECKPOINTING` is `auto`. `auto` is as many as needed.",
        since=None,
    )
    padding_free: Auto | bool = _setting(
        "auto",
        "Concatenate the rows of a batch instead of padding them. `auto` does so on Ampere and newer GPUs. Packing requires it.",
        since=None,
    )
    decoder_layers: Literal["auto", "fused", "compiled", "plain"] = _setting(
        "auto",
        "Layer implementation: `fused` (our own, for Llama), `compiled` (torch.compile), or `plain`. `auto` is `fused` where possible.",
        since=None,
    )
    cuda_graphs: bool = _setting(
        True,
        "Launch short batches as CUDA graphs where that is faster and fits in memory. `false` launches each kernel by itself.",
        since=None,
    )
    resident_weights: Auto | bool = _setting(
        "auto",
        "Keep 4-bit weights dequantized to 16 bits during training. `auto` does so where it is faster and fits in memory.",
        since=None,
    )
    micro_batch_tokens: Auto | Annotated[int, Field(ge=1)] = _setting(
        "auto",
        "Maximum tokens computed at once. Larger batches are split between rows, never within one. `auto` is as many as fit in memory.",
        since=None,
    )
    frozen_precision: Literal["bf16", "fp8"] = _setting(
        "bf16",
        "`fp8` computes the frozen layers in 8-bit floats (Ada, Hopper and newer GPUs). It is faster, but results differ slightly.",
        since="train",
    )
    gpu_memory_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = _setting(
        None, "Limit on GPU memory for training, in GiB. Unset: all free memory.", since=None
    )
    plan_gpu: NonEmpty | None = _setting(
        None,
        "GPUs to plan for in `entrypoint.py plan`: `A100-40GB`, several such as `H100,2xL40S`, or `all`. Unset: this machine's, or all.",
        since=None,
    )
    gpu_price: Prices = _setting(
        {},
        "Price of a GPU per hour, for `entrypoint.py plan`: one number, or one for each, such as `A100=1.5,H100=2.9`.",
        since=None,
    )
    max_grad_norm: float = _setting(0.3, "Maximum gradient norm. Larger gradients are clipped.", since="train", gt=0)
    learning_rate: float = _setting(2e-4, "Peak learning rate.", since="train", gt=0, le=10)
    weight_decay: float = _setting(0.001, "AdamW weight decay.", since="train", ge=0, le=1)
    optim: NonEmpty = _setting(
        "paged_adamw_32bit",
        "Optimizer, by its transformers name. Paged optimizers become `adamw_torch` on the CPU.",
        since="train",
    )
    lr_scheduler_type: NonEmpty = _setting("cosine", "Learning-rate schedule, by its transformers name.", since="train")
    warmup_ratio: float = _setting(
        0.03, "Fraction of the steps used for learning-rate warmup.", since="train", ge=0, lt=1
    )
    group_by_length: bool = _setting(
        True, "Batch rows of similar length together. Has no effect with packing.", since="train"
    )
    eval_steps: int | None = _setting(
        None, "Steps between evaluations. Unset: only at the start and at the end.", since="train", ge=1
    )
    early_stopping_patience: int | None = _setting(
        None,
        "Stop after this many evaluations in a row without a lower loss, and keep the best adapter. Needs `FT_EVAL_STEPS`.",
        since="train",
        ge=1,
    )
    save_steps: Auto | Annotated[int, Field(ge=1)] = _setting(
        "auto",
        "Steps between checkpoints. `auto` measures saves and uploads, then saves every 30 s to 10 min, for about 1% of the time.",
        since=None,
    )
    logging_steps: int = _setting(5, "Steps between points on the loss curve.", since=None, ge=1)
    seed: int = _setting(42, "Seed for every random choice.", since="prepare", ge=0, lt=2**32)
    extra_training_args: JsonObject = _setting(
        {}, "Extra SFTConfig arguments that no variable here covers, as a JSON object.", since="train"
    )

    # -- sampling -----------------------------------------------------------------------------------------------
    sample_prompts: Prompts = _setting(
        ("What is a large language model?",),
        "Prompts that the base and the fine-tuned model answer, as a JSON list.",
        since="sample",
    )
    sample_max_new_tokens: int = _setting(
        200, "Maximum length of an answer, in tokens.", since="sample", ge=1, le=32768
    )

    # -- merging ------------------------------------------------------------------------------------------------
    merge_base: Literal["quantized", "original"] = _setting(
        "quantized",
        "Weights that the adapter is merged into: those it was trained on (dequantized from 4 bits), or the base model's original ones.",
        since="merge",
    )
    merge_dtype: Literal["auto", "float16", "bfloat16", "float32"] = _setting(
        "auto", "Data type of the merged model. `auto` is the base model's.", since="merge"
    )
    merge_max_kl: Auto | Annotated[float, Field(gt=0, allow_inf_nan=False)] = _setting(
        "auto",
        "Largest mean KL divergence of the merged model from the trained one, in nats per token, with which it is published. `auto` is 0.02, and none for `FT_MERGE_BASE=original`, whose cost is told.",
        since="merge",
    )
    max_shard_gb: float = _setting(
        4, "Largest size of one file of the merged model, in GB.", since="merge", ge=0.001, le=50
    )

    export: CommaFormats = _setting(
        (),
        "Formats to publish beside the merged model, each compared with it: `gguf-f16`, `gguf-q8_0`, `gguf-q4_k_m` and `fp8`. Needs `requirements-export.txt`.",
        since="export",
    )

    # -- where things go ----------------------------------------------------------------------------------------
    output_dir: Path = _setting(Path("results"), "Local folder for everything the job writes.", since=None)
    store_url: NonEmpty | None = _setting(
        None,
        "Where checkpoints and results are kept: a folder or `s3://bucket/prefix`. Unset: `store` in the output folder.",
        since=None,
    )
    s3_server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = _setting(
        None,
        "Encryption that objects are written to S3 with (`ServerSideEncryption`). Unset: the bucket's own default.",
        since=None,
    )
    s3_sse_kms_key_id: NonEmpty | None = _setting(
        None,
        "KMS key that `aws:kms` encrypts with (`SSEKMSKeyId`): an id, an alias or an ARN. Unset: the account's key for S3.",
        since=None,
    )
    s3_request_payer: Literal["requester"] | None = _setting(
        None, "`requester` agrees to pay for requests to buckets whose owner does not (`RequestPayer`).", since=None
    )
    run_id: RunId | None = _setting(
        None,
        "Name of the run, the same across restarts. Unset: the Slurm job's id, or a hash of the settings.",
        since=None,
    )
    publish_to: NonEmpty | None = _setting(
        None,
        "Where to publish: `hf://user/name` or `hf://user/name@branch` for the Hub, `s3://bucket/prefix`, a folder, or several of these, separated by commas. Unset: `published/NEW_MODEL` in the output folder, and with an S3 store also `RUN_ID/published` there.",
        since="publish",
    )
    publish: Literal["both", "adapter", "merged"] = _setting(
        "both",
        "What to publish: the merged model with the adapter in `adapter/`, or only one of them. With `adapter` nothing is merged.",
        since="publish",
    )
    hub_private: bool = _setting(True, "Make the Hub repository private if the job creates it.", since="publish")

    # -- how it runs --------------------------------------------------------------------------------------------
    stages: Stages = _setting(
        STAGE_NAMES, "Stages to run. Stages they depend on run too, unless already complete.", since=None
    )
    device: Literal["cuda", "cpu"] = _setting(
        "cuda", "Device to compute on. A missing GPU is an error, never a silent fallback to the CPU.", since=None
    )
    device_map: Auto | NonEmpty = _setting(
        "auto",
        "Model placement: `auto` (the whole model on each process's own GPU), or a transformers device map, by name or as a JSON object.",
        since=None,
    )
    nproc_per_node: Auto | Annotated[int, Field(ge=1, le=64)] = _setting(
        "auto", "Training processes on this machine. `auto` is one per visible GPU.", since="train"
    )
    nnodes: Auto | Annotated[int, Field(ge=1, le=1024)] = _setting(
        "auto", "Number of nodes that train together. `auto` is the size of the Slurm step, else 1.", since=None
    )
    node_rank: Auto | Annotated[int, Field(ge=0, lt=1024)] = _setting(
        "auto", "Rank of this node, from 0. `auto` reads it from Slurm or from a Kubernetes Indexed Job.", since=None
    )
    master_addr: Auto | NonEmpty = _setting(
        "auto",
        "Host name or address at which the other nodes reach the first. `auto` is the first node's own address.",
        since=None,
    )
    master_port: Auto | Annotated[int, Field(ge=1, le=65535)] = _setting(
        "auto", "Port on the first node where the nodes meet. `auto` picks a free one.", since=None
    )
    sharding: Literal["none", "full"] = _setting(
        "none",
        "`none`: every GPU holds the whole model (DDP). `full`: each GPU holds a slice of every weight (FSDP2), which saves memory in training. While it loads, the model must still fit on each GPU.",
        since="train",
    )
    env_file: Path = _setting(
        Path(".env"), "File with more variables, read if it exists. The environment takes precedence.", since=None
    )
    container: NonEmpty | None = _setting(
        None,
        "For `slurm/train.sh`: a `.sif` file (Apptainer) or an image (Pyxis/Enroot) to run in. Unset: `.venv`.",
        since=None,
    )
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = _setting(
        None,
        "Port for Prometheus metrics (`/metrics`) and the liveness probe (`/healthz`). Unset: neither is served.",
        since=None,
    )
    metrics_address: str = _setting(
        "", "Address that the metrics port listens on, such as `127.0.0.1`. Unset: all of them.", since=None
    )
    stall_seconds: float = _setting(
        1800,
        "Seconds without any progress in a stage after which `/healthz` fails and the job ends with exit code 69.",
        since=None,
        ge=1,
        le=604800,
    )
    max_idle_starts: int = _setting(
        5,
        "Give up after this many starts in a row that stored nothing new: the next one ends with exit code 69. 0: never.",
        since=None,
        ge=0,
        le=1000,
    )
    termination_log: Path = _setting(
        Path("/dev/termination-log"),
        "File for the last error as one JSON line, if it exists. If it is a folder, each node writes its own file there.",
        since=None,
    )
    stop_grace_seconds: float = _setting(
        25, "Seconds that a stop request leaves for saving before the job is killed.", since=None, ge=0, le=86400
    )
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto", "`auto` is text on a terminal and in Slurm's log, and one JSON object per line elsewhere.", since=None
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Lowest level of messages to show.", since=None
    )

    @property
    def new_model_name(self) -> str:
        """What the trained model is called: FT_NEW_MODEL, else the names of the base model and the dataset."""
        if self.new_model != "auto":
            return self.new_model
        one = not re.search(r"[,*]|^\[", self.dataset_name)
        dataset = self.dataset_name if one else "mixture"
        parts = (text.partition("@")[0].rstrip("/").rsplit("/", 1)[-1] for text in (self.model_name, dataset))
        ending = r"\.(jsonl?|ndjson|[ct]sv|parquet|arrow|feather|txt)(\.(gz|bz2|zst|xz))?$"
        stems = (re.sub(ending, "", part, flags=re.IGNORECASE) for part in parts)
        name = re.sub(r"[^A-Za-z0-9._-]+|(?<=[.-])[.-]+", "-", "-".join(stems)).strip("-.")
        return name[:96].rstrip("-.") or "model"

    @property
    def destinations(self) -> tuple[str, ...]:
        """The places that FT_PUBLISH_TO names."""
        return tuple(part.strip() for part in (self.publish_to or "").split(",") if part.strip())

    @property
    def publishes_adapter_first(self) -> bool:
        """Whether the adapter goes to a branch of a Hub repository when training ends."""
        on_hub = any(place.startswith("hf://") for place in self.destinations)
        return on_hub and self.publish == "both" and "publish_adapter" in self.stages

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_split is not None or self.eval_dataset_name is not None

    def fingerprint(self, stage: str, but: tuple[str, ...] = ()) -> str:
        """SHA-256 of the settings that the result of `stage` depends on, except those named.

        Settings at their default are left out, so a newer version with more settings still recognizes older runs.
        """
        values = self.affecting(stage).items()
        chosen = {name: value for name, value in values if value != default_value(name) and name not in but}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def affecting(self, stage: str) -> dict[str, Any]:
        """The settings that the result of `stage` depends on, as JSON values."""
        known = STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]
        values = self.model_dump(mode="json")
        return {name: values[name] for name, since in _since().items() if since in known}


def _since() -> dict[str, str | None]:
    extras = ((name, field.json_schema_extra) for name, field in Settings.model_fields.items())
    return {name: typing.cast(dict[str, Any], extra)["since"] for name, extra in extras}


def variable(field_name: str) -> str:
    """`lora_r` → `FT_LORA_R`."""
    return PREFIX + field_name.upper()


def default_value(field_name: str) -> Any:
    """The default of a setting, as a JSON value."""
    return json.loads(json.dumps(Settings.model_fields[field_name].default, default=str))


def default_text(field_name: str) -> str:
    """The default of a setting, as text for the environment."""
    return value_text(Settings.model_fields[field_name].default)


def value_text(value: Any) -> str:
    """The value of a setting, as text for the environment."""
    if value is None:
        return "(unset)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict) or (isinstance(value, tuple | list) and any(" " in item for item in value)):
        return json.dumps(value)
    return ",".join(value) if isinstance(value, tuple | list) else str(value)


def allowed_text(field_name: str) -> str:
    """The allowed values of a setting, in words: `a whole number, at least 1 and at most 4096`."""
    field = Settings.model_fields[field_name]
    words = next((item.text for item in field.metadata if isinstance(item, _Words)), None)
    if words is not None:
        return words
    limits = [_limit(item) for item in field.metadata]
    return ", ".join([_type_text(field.annotation), *filter(None, [" and ".join(filter(None, limits))])])


_LIMITS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _limit(item: Any) -> str:
    return " and ".join(words.format(getattr(item, name)) for name, words in _LIMITS.items() if hasattr(item, name))


def _type_text(annotation: Any) -> str:
    if annotation is type(None):
        return ""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        if (words := next((item.text for item in arguments[1:] if isinstance(item, _Words)), None)) is not None:
            return words
        limits = [_limit(part) for item in arguments[1:] for part in getattr(item, "metadata", [item])]
        return " ".join(filter(None, [_type_text(arguments[0]), *limits]))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        inner = _type_text(arguments[0])
        return f"a list of {inner}"
    if origin is dict:
        return "a JSON object"
    return " or ".join(filter(None, map(_type_text, arguments)))
