"""The merged model is the trained one, to the bit, whatever the adapter and the base are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.errors import InputError
from job.model.changes import base_weights
from job.model.merge import Recipe, UnknownLayout, merged_state, skeleton, write_merged, write_merged_whole
from job.model.quantization import FourBit, full_weight
from job.model.safetensors_files import Tensor, Weights, write_shards
from tests.conftest import ROOT, compute_of, load_model

BASES = {
    "nf4": {},
    "nested fp4": {"USE_NESTED_QUANT": "true", "BNB_4BIT_QUANT_TYPE": "fp4"},
    "16 bit": {"USE_4BIT": "false"},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 3}},
    "whole head": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"trainable_token_indices": {"embed_tokens": [5, 511], "lm_head": [5, 511]}},
}


@pytest.fixture(scope="module")
def tied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix for embedding and head."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


def base_is(run: Any, folder: Path) -> None:
    run.paths.model_dir.unlink()
    run.paths.model_dir.symlink_to(folder)


def train_something(run: Any, adapter: Path, **kind: Any) -> PeftModel:
    """A model whose adapter changes every weight that it can, and its folder."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kind})
    model = get_peft_model(load_model(run, quantized=run.settings.use_4bit), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(adapter)
    return model


def merge(run: Any, adapter: Path, folder: Path, **recipe: Any) -> dict[str, str]:
    compute = compute_of(run)
    chosen = {"device": compute.device, "held_in": compute.dtype, "dtype": torch.float32, "four_bit": FourBit.of(run.settings) if run.settings.use_4bit else None}  # fmt: skip
    return write_merged(run.paths.model_dir, adapter, folder, run.settings, Recipe(**{**chosen, **recipe}), compute)


def merged_by_peft(trained: PeftModel, run: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft's own merge gives in float32 on the same base: the dequantized one, if it is in 4 bits."""
    plain = AutoModelForCausalLM.from_pretrained(run.paths.model_dir, dtype=torch.float32)
    dequantized = {
        name: full_weight(module) if name.endswith("weight") else parameter.data
        for name, module, parameter in base_weights(trained)
    }
    plain.load_state_dict(dequantized, strict=False)
    whole = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    return {name: parameter.data for name, parameter in whole.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_the_merge_is_pefts_own_bit_for_bit(
    base: str,
    kind: str,
    tied: bool,
    dtype: torch.dtype,
    make_run_with_model: Callable[..., Any],
    tied_model: Path,
    tmp_path: Path,
) -> None:
    """DoRA divides by a norm, and sums of squares come in another order there: within one rounding."""
    run = make_run_with_model(**BASES[base])
    options = dict(KINDS[kind])
    if tied:
        base_is(run, tied_model)
        if kind == "whole head":
            options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        elif kind == "new tokens":
            options = {"trainable_token_indices": [5, 511]}
    trained = train_something(run, tmp_path / "adapter", **options)
    merge(run, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    found, expected = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        merged_by_peft(trained, run, tmp_path / "adapter"),
    )
    assert set(found) == set(expected) - ({"lm_head.weight"} if tied else set())
    for name, values in found.items():
        assert values.dtype == dtype
        if kind == "dora":
            torch.testing.assert_close(values, expected[name].to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-7)
        else:
            assert torch.equal(values, expected[name].to(dtype)), name
    before = load_file(run.paths.model_dir / "model.safetensors")
    assert any(not torch.equal(values.float(), before[name].float()) for name, values in found.items())


def test_a_base_that_is_already_in_4_bits_is_merged_into_a_plain_model(
    make_run_with_model: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=stored, device_map={"": "cpu"})
    quantized.save_pretrained(tmp_path / "base")
    run = make_run_with_model()
    base_is(run, tmp_path / "base")
    trained = train_something(run, tmp_path / "adapter")
    merge(run, tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, values in merged_state(trained):
        assert torch.equal(merged.state_dict()[name], values.float()), name


def test_without_its_4_bits_the_base_is_the_original_one(
    make_run_with_model: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run_with_model()
    trained = train_something(run, tmp_path / "adapter", target_modules=["q_proj"])
    merge(run, tmp_path / "adapter", tmp_path / "merged", held_in=None, four_bit=None)
    found, before = Weights(tmp_path / "merged"), Weights(run.paths.model_dir)
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"].float())
    layer = trained.get_base_model().model.layers[0].self_attn.q_proj
    expected = before["model.layers.0.self_attn.q_proj.weight"].float() + layer.get_delta_weight("default")
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], expected)


def test_a_base_whose_files_name_weights_in_their_own_way_is_merged_in_memory(
    make_run_with_model: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    run = make_run_with_model()
    trained = train_something(run, tmp_path / "adapter")
    merge(run, tmp_path / "adapter", tmp_path / "one by one")
    shutil.copytree(tiny_model, tmp_path / "base")
    renamed = {
        name.removeprefix("model."): value for name, value in load_file(tiny_model / "model.safetensors").items()
    }
    save_file(renamed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base_is(run, tmp_path / "base")
    with pytest.raises(UnknownLayout):
        merge(run, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    compute = compute_of(run)
    recipe = Recipe(
        device=compute.device, held_in=compute.dtype, four_bit=FourBit.of(run.settings), dtype=torch.float32
    )
    write_merged_whole(trained, tmp_path / "base", tmp_path / "merged", recipe)
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one by one", "merged")
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_shards_are_hashed_while_they_are_written_and_the_index_names_every_weight(
    make_run_with_model: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run_with_model()
    train_something(run, tmp_path / "adapter")
    merge(run, tmp_path / "adapter", tmp_path / "one")
    hashes = merge(run, tmp_path / "adapter", tmp_path / "several", shard_bytes=150_000)
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) == len(hashes) - 1 > 2
    for name, digest in hashes.items():
        assert hashlib.sha256((tmp_path / "several" / name).read_bytes()).hexdigest() == digest
    one, several = Weights(tmp_path / "one"), Weights(tmp_path / "several")
    assert set(one) == set(several)
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "several").lm_head.weight.shape == (512, 64)


def test_values_that_do_not_fit_float16_are_an_error_and_not_infinite(
    make_run_with_model: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run_with_model()
    model = train_something(run, tmp_path / "adapter")
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight.fill_(1e6)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight .* do not fit float16.*"):
        merge(run, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_go_to_4_bits_and_back_as_with_bitsandbytes(kind: str, nested: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(96, 192) * 0.02).to(dtype)
    weight[3, :64], weight[4, 64:96], weight[5, 7] = 0, 0, 3
    weight[6, :64] = torch.linspace(-1, 1, 64)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    expected = bnb.functional.dequantize_4bit(packed, state).float()
    rows = FourBit(kind, nested).in_parts(weight, dtype)
    assert rows is not None
    assert torch.equal(torch.cat([rows(0, 7), rows(7, 96)]), expected)
    assert torch.equal(FourBit(kind, nested).values(weight).float(), expected)
    assert len(expected.unique()) > 100
    assert FourBit(kind, nested).in_parts(weight[:, :100], dtype) is None


def test_the_merged_folder_does_not_mention_4_bits_or_code_and_keeps_the_words_of_the_base(
    make_run_with_model: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoConfig": "evil--repo.Config"}, "house_style": "kept"}
    config["rope_parameters"] = {
        "rope_theta": 500000.0,
        "rope_type": "linear",
        "factor": 2.0,
    }  # as transformers 5 says it
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run = make_run_with_model()
    base_is(run, tmp_path / "base")
    train_something(run, tmp_path / "adapter")
    merge(run, tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert written["torch_dtype"] == "bfloat16"
    assert (written["rope_theta"], written["house_style"]) == (500000.0, "kept")
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.rope_parameters
    assert (loaded["rope_theta"], loaded["rope_type"], loaded["factor"]) == (500000.0, "linear", 2.0)
    assert not {"auto_map", "quantization_config"} & set(written)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_the_merge_holds_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    """A model of 0.5 GB is merged with less than 0.4 GB beside what the libraries take."""
    made = textwrap.dedent("""
        import sys, threading, time
        from pathlib import Path
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
        from job.model.compute import Compute
        from job.model.merge import Recipe, write_merged
        from job.settings import Settings

        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
        folder = Path(sys.argv[1])
        if sys.argv[2] == "make":
            config = LlamaConfig(vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8)
            model = LlamaForCausalLM(config).bfloat16()
            model.save_pretrained(folder / "base")
            get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
        else:
            settings = Settings(device="cpu")
            compute = Compute.of(settings, local_rank=0, config={})
            before, most = anonymous(), [0.0]
            def watch():
                while True:
                    most[0] = max(most[0], anonymous())
                    time.sleep(0.005)
            threading.Thread(target=watch, daemon=True).start()
            write_merged(folder / "base", folder / "adapter", folder / "merged", settings, Recipe.of(settings, compute, torch.bfloat16), compute)
            print(most[0] - before)
    """)
    run = [sys.executable, "-c", made, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*run, "make"], check=True, capture_output=True, env=environment)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size / 2**20
    taken = float(subprocess.run([*run, "merge"], check=True, capture_output=True, env=environment).stdout.split()[-1])
    assert size > 500
    assert taken < 400 + 50


def test_a_tensor_of_another_shape_than_announced_is_never_written_as_if_it_were_right(tmp_path: Path) -> None:
    wrong = Tensor((2, 2), torch.float32, lambda: torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="weight became"):
        write_shards(tmp_path, {"weight": wrong}, 1000)


def test_a_skeleton_has_shapes_and_no_values(tiny_model: Path) -> None:
    assert all(parameter.is_meta for parameter in skeleton(tiny_model).parameters())
