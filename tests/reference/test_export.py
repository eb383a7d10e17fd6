"""Folders in and out: bits, both modes of the gate, adapters, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medreason_jax.cli import exit_code_of, run_arguments
from medreason_jax.config import MeshConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.qwen2.export import export_model
from medreason_jax.qwen2.folder import ModelFolder
from medreason_jax.qwen2.importing import import_folder, import_peft_folder
from medreason_jax.qwen2.load import load_model
from medreason_jax.qwen2.tensor_files import Tensor, TensorFiles, write_tensor_files

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")

from tests.reference.models import LM, in_type, relative_error, rough_reference  # noqa: E402

ONE = MeshConfig(data=-1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Velotan is given 2 times a day."] * 20, 320, "Answer.", folder)
    return ChatTokenizer(folder)


def published(folder, tokenizer, dtype="bfloat16", architecture=LM, **fields):
    """A folder as `transformers` writes it, with a tokenizer: (folder, model in float32)."""
    fields = {"vocab_size": 320, "pad_token_id": tokenizer.pad_id, **fields}
    reference = in_type(rough_reference(fields, architecture=architecture), getattr(torch, dtype))
    reference.save_pretrained(folder)
    tokenizer.save(folder)
    return folder, in_type(reference, torch.float32)


def tensors(folder) -> dict[str, np.ndarray]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_import_and_export_give_every_tensor_back_bit_by_bit(tmp_path, tokenizer, dtype, tied):
    source, _ = published(tmp_path / "hf", tokenizer, dtype, tie_word_embeddings=tied)
    import_folder(source, tmp_path / "ckpt", ONE)
    facts = export_model(tmp_path / "ckpt", tmp_path / "out", card="card")
    assert facts["mode"] == "full" and facts["dtype"] == dtype and facts["logit_error"] <= 1e-5
    before, after = tensors(source), tensors(tmp_path / "out")
    assert set(before) == set(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array.view(np.uint8), after[name].view(np.uint8), name)


def test_the_folder_opens_in_transformers_and_stops_at_the_end_of_its_turn(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source, _ = published(tmp_path / "hf", tokenizer)
    import_folder(source, tmp_path / "ckpt", ONE)
    facts = export_model(tmp_path / "ckpt", tmp_path / "out", card="# card")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == tokenizer.end_id != generation.pad_token_id
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == tokenizer.end_id and theirs.pad_token_id == tokenizer.pad_id
    messages = [{"role": "user", "content": "How often is Velotan given?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt(messages) == ids
    assert json.loads((tmp_path / "out/parity.json").read_text()) == facts
    assert not (tmp_path / "out.partial").exists()


def test_layer_by_layer_the_gate_finds_the_same(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer, tie_word_embeddings=False)
    import_folder(source, tmp_path / "ckpt", ONE)
    facts = export_model(tmp_path / "ckpt", tmp_path / "out", card="card", gate="layerwise")
    assert facts["mode"] == "layerwise" and facts["layers"] == 3
    assert facts["logit_error"] <= 1e-5 and facts["layer_error"] <= 1e-5


@pytest.mark.parametrize("gate", ["full", "layerwise"])
def test_the_gate_sees_one_wrong_tensor(tmp_path, tokenizer, gate, monkeypatch):
    source, _ = published(tmp_path / "hf", tokenizer)
    import_folder(source, tmp_path / "ckpt", ONE)
    from medreason_jax.qwen2 import export

    def damaged(folder, planned):
        name = "model.layers.1.self_attn.k_proj.bias"
        planned = [
            Tensor(t.name, t.dtype, t.shape, lambda t=t: t.read() + (t.name == name))
            for t in planned
        ]
        write_tensor_files(folder, planned)

    monkeypatch.setattr(export, "write_tensor_files", damaged)
    with pytest.raises(RuntimeError, match="transformers"):
        export_model(tmp_path / "ckpt", tmp_path / "out", card="card", gate=gate)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()


def test_files_are_split_with_an_index_and_read_back(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    source, reference = published(tmp_path / "hf", tokenizer, "float32")
    files = TensorFiles(source)
    planned = [
        Tensor(name, files.dtype(name), files.shape(name), lambda n=name: files.read(n))
        for name in files.where
    ]
    out = tmp_path / "split"
    shutil.copytree(source, out)
    (out / "model.safetensors").unlink()
    write_tensor_files(out, planned, limit=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == files.total_bytes
    again = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    ours = load_model(out, ONE, "float32").params
    jax.tree.map(np.testing.assert_array_equal, ours, load_model(source, ONE, "float32").params)


@pytest.mark.parametrize(
    ("architecture", "labels"),
    [("Qwen2ForSequenceClassification", 2), ("Qwen2ForTokenClassification", 1)],
)
@pytest.mark.parametrize("gate", ["full", "layerwise"])
def test_classifier_and_value_model_come_back_bit_by_bit(
    tmp_path, tokenizer, architecture, labels, gate
):
    source, _ = published(tmp_path / "hf", tokenizer, "float32", architecture, num_labels=labels)
    import_folder(source, tmp_path / "ckpt", ONE)
    facts = export_model(tmp_path / "ckpt", tmp_path / "out", card="card", gate=gate)
    assert facts["logit_error"] <= 1e-5
    before, after = tensors(source), tensors(tmp_path / "out")
    assert set(before) == set(after) and "score.weight" in after
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    with pytest.raises(ValueError, match=architecture):
        load_model(tmp_path / "ckpt", ONE, "float32").engine(1)


def command(*arguments) -> int:
    return exit_code_of(lambda: run_arguments([str(argument) for argument in arguments]))


@pytest.fixture
def adapter(tmp_path, tokenizer):
    """(folder of the base, `peft` folder, logits of some tokens by `peft`)."""
    peft = pytest.importorskip("peft", reason="the export extra (peft) is missing")
    source, reference = published(tmp_path / "hf", tokenizer, "float32")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "peft")
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        return source, tmp_path / "peft", tokens, model.eval()(tokens).logits.numpy()


def test_an_adapter_goes_in_and_out_and_merges(tmp_path, adapter, capsys):
    import peft
    from transformers import AutoModelForCausalLM

    base, folder, tokens, expected = adapter
    assert command("import", folder, tmp_path / "a") == 2
    assert "--base" in capsys.readouterr().err
    assert command("import", folder, tmp_path / "a", "--base", base) == 0
    assert command("export", tmp_path / "a", tmp_path / "x") == 2
    assert "--merged" in capsys.readouterr().err
    assert command("export", "--adapter", tmp_path / "a", tmp_path / "again") == 0
    assert command("export", "--merged", tmp_path / "a", tmp_path / "merged") == 0

    before, after = tensors(folder), tensors(tmp_path / "again")
    assert set(before) == set(after)
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.inference_mode():
        assert relative_error(theirs(tokens).logits.numpy(), expected) <= 1e-6
        assert relative_error(merged(tokens).logits.numpy(), expected) <= 1e-5


def test_a_missing_or_misshapen_tensor_is_named(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer, "float32")
    file, whole = source / "model.safetensors", tensors(source)
    name = "model.layers.1.mlp.up_proj.weight"

    def importing(changed):
        save_file(changed, file)
        import_folder(source, tmp_path / "ckpt", ONE)

    with pytest.raises(ValueError, match=name):
        importing({key: value for key, value in whole.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} has shape \(40, 32\)"):
        importing({**whole, name: whole[name].T[:32, :40].T.copy()})
    with pytest.raises(ValueError, match=r"1 unexpected tensors: \['extra'\]"):
        importing({**whole, "extra": whole[name]})
    with pytest.raises(ValueError, match="stored as I8"):
        importing({**whole, name: whole[name].astype(np.int8)})
    assert not (tmp_path / "ckpt").exists()


def test_folders_that_could_harm_are_refused(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer)
    index = source / "model.safetensors.index.json"
    weights = source / "model.safetensors"
    for place, words in (("../x.safetensors", "outside"), ("pytorch_model.bin", "only .safe")):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(ValueError, match=words):
            ModelFolder(source)
    index.unlink()
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ModelFolder(source)
    weights.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled"):
        ModelFolder(source)


def test_nothing_that_exists_is_overwritten(tmp_path, tokenizer, capsys):
    source, _ = published(tmp_path / "hf", tokenizer)
    (tmp_path / "there").mkdir()
    assert command("import", source, tmp_path / "there") == 2
    assert command("export", source, tmp_path / "there") == 2
    assert capsys.readouterr().err.count("exists; choose another folder") == 2


def test_parameters_land_where_the_mesh_wants_them(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer, num_attention_heads=4)
    whole = load_model(source, ONE, "float32")
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    model = load_model(source, mesh, "float32")
    wanted = model.sharder.tree(model.params)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), model.params, wanted
    )
    jax.tree.map(np.testing.assert_array_equal, whole.params, model.params)
    with pytest.raises(ValueError, match=r"tensor=8 does not divide num_attention_heads=4"):
        load_model(source, MeshConfig(tensor=8), "float32")
    assert jnp.float32 == jax.tree.leaves(model.params)[0].dtype


def test_the_stored_type_counts_not_the_one_that_config_names(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer, "float32")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    import_folder(source, tmp_path / "ckpt", ONE)
    facts = export_model(tmp_path / "ckpt", tmp_path / "out", card="card", gate="layerwise")
    assert facts["dtype"] == "float32"
    for name, array in tensors(source).items():
        np.testing.assert_array_equal(array, tensors(tmp_path / "out")[name])


def test_a_tied_folder_with_another_head_is_refused_and_with_a_copy_is_read(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer, "float32")
    whole = tensors(source)
    embedding = whole["model.embed_tokens.weight"]
    save_file({**whole, "lm_head.weight": embedding.copy()}, source / "model.safetensors")
    ModelFolder(source)
    save_file({**whole, "lm_head.weight": 2 * embedding}, source / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings=true, but lm_head"):
        ModelFolder(source)


def test_a_folder_of_the_user_is_never_taken_for_a_failed_attempt(tmp_path, tokenizer):
    source, _ = published(tmp_path / "out.partial", tokenizer)
    with pytest.raises(ValueError, match=r"out\.partial exists"):
        export_model(source, tmp_path / "out", card="card")
    assert (source / "model.safetensors").is_file()


def test_an_adapter_knows_its_base(tmp_path, tokenizer, adapter, capsys):
    base, folder, _, _ = adapter
    assert command("import", folder, tmp_path / "a", "--base", base) == 0
    whole = tensors(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**whole, name: 2 * whole[name]}, base / "model.safetensors", {"format": "pt"})
    assert command("export", "--merged", tmp_path / "a", tmp_path / "out") == 2
    assert "another model than the adapter was trained on" in capsys.readouterr().err
    base.rename(tmp_path / "moved")
    assert command("export", "--merged", tmp_path / "a", tmp_path / "out") == 2
    assert "move it back, or edit base" in capsys.readouterr().err
    assert command("export", "--adapter", tmp_path / "a", tmp_path / "o", "--dtype", "float16") == 2


def test_an_adapter_of_more_layers_is_refused(tmp_path, tokenizer, adapter):
    _, folder, _, _ = adapter
    shallow, _ = published(tmp_path / "shallow", tokenizer, num_hidden_layers=2)
    with pytest.raises(ValueError, match="does not fit a model of 2 layers"):
        import_peft_folder(folder, tmp_path / "a", shallow)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, tokenizer):
    source, _ = published(tmp_path / "hf", tokenizer)
    import_folder(source, tmp_path / "ckpt", ONE)
    path = tmp_path / "ckpt/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"do not fit config\.json; layers"):
        ModelFolder(tmp_path / "ckpt")
