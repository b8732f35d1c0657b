"""`sao fetch`: from a GGUF file to a model that the engines load, once, whole or not at all."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from typer.testing import CliRunner

from sao_utils import cli, fetch
from sao_utils.engines.base import EngineError, Sampling
from sao_utils.engines.loading import find, model_folder
from sao_utils.engines.registry import load_engine
from sao_utils.recipe import Model, RecipeError
from sao_utils.store import fetched, open_run

WIDTH, INNER = 64, 96
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "ab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def write_gguf(path):
    """A model of one layer with random weights in Q4_1; gives what its matrices are in full."""
    rng, writer, full = np.random.default_rng(0), gguf.GGUFWriter(path, "llama"), {}
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(WORDS), WIDTH), "blk.0.attn_q": (WIDTH, WIDTH)}
    shapes |= {f"blk.0.attn_{part}": (WIDTH // 2, WIDTH) for part in "kv"}
    shapes |= {"blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    shapes |= {f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")}
    for name, shape in shapes.items():
        q4 = gguf.GGMLQuantizationType.Q4_1
        packed = quantize(rng.normal(size=shape).astype(np.float32), q4)
        full[name] = torch.tensor(dequantize(packed, q4)).bfloat16()
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=q4)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return full


def test_a_gguf_file_becomes_a_model_with_the_weights_that_it_packs(tmp_path):
    full = write_gguf(tmp_path / "model.gguf")
    fetch.unpack(tmp_path / "model.gguf", tmp_path / "model")
    engine = load_engine(Model(path=str(tmp_path / "model"), dtype="bfloat16"))
    weights, layer = engine.model.state_dict(), "model.layers.0"
    assert torch.equal(weights["model.embed_tokens.weight"], full["token_embd"])
    assert torch.equal(weights[f"{layer}.self_attn.v_proj.weight"], full["blk.0.attn_v"])
    assert torch.equal(weights[f"{layer}.mlp.down_proj.weight"], full["blk.0.ffn_down"])
    assert engine.tokenizer.chat_template == TEMPLATE
    (batch,) = engine.generate([[{"role": "user", "content": "ab"}]], Sampling(0.0, 4), [0])
    assert batch[0][1].tokens


@pytest.fixture
def offline(results, monkeypatch):
    """No hub; and a package that breaks off half-way as often as the list says."""
    breaks = []

    def package(folder, log):
        (folder / "config.json").write_text("{}")
        if breaks:
            raise breaks.pop()
        (folder / "model.safetensors").write_bytes(b"")
        return {"package": "some"}

    monkeypatch.setattr(fetch, "_from_package", package)
    return breaks


def test_what_breaks_off_is_never_taken_for_a_model_and_the_next_call_brings_it(offline):
    offline += [KeyboardInterrupt(), RuntimeError("no registry")]
    with pytest.raises(RuntimeError, match="no registry"):
        fetch.fetch("smollm2", log=list)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("smollm2", log=list)
    assert fetched("smollm2") is None
    with pytest.raises(EngineError, match="sao fetch smollm2"):
        find(Model(path="smollm2"))
    said = []
    folder = fetch.fetch("smollm2", said.append)
    assert fetched("smollm2") == folder and "OfflineModeIsEnabled" in said[0]
    assert json.loads((folder / "source.json").read_text()) == {"package": "some"}
    offline.append(AssertionError("it is made again"))
    assert fetch.fetch("smollm2", log=list) == folder


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for one model: the embedded one, and what a fetch should leave there."""

    files = {path.name: path.read_bytes() for path in Path(model_folder("tiny")).iterdir()}
    files |= {"onnx/model.safetensors": b"large", "pytorch_model.bin": b"not safe"}

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self):
        _, _, name = self.path.partition(f"/resolve/{fetch.REVISION}/")
        info = {"id": fetch.REPOSITORY, "sha": fetch.REVISION}
        tree = [
            {"type": "file", "path": path, "size": len(data), "oid": path}
            for path, data in self.files.items()
        ]
        listing = tree if "/tree/" in self.path else info
        body = self.files[name] if name else json.dumps(listing).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", fetch.REVISION)
        self.end_headers()
        return body

    def log_message(self, *_):
        pass


def test_where_the_hub_answers_the_models_own_weights_come_from_it(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, "-m", "sao_utils", "fetch", "smollm2"]
    done = subprocess.run(
        command, env={**env, "SAO_RESULTS": str(tmp_path)}, capture_output=True, text=True
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    left_out = {"onnx/model.safetensors", "pytorch_model.bin", "README.md", "pretraining.jsonl"}
    wanted = {*Hub.files, "source.json"} - left_out
    assert {path.name for path in folder.iterdir()} == wanted
    assert json.loads((folder / "source.json").read_text())["revision"] == fetch.REVISION
    assert load_engine(Model(path=str(folder))).model.num_parameters() > 1_000_000


def test_rows_name_the_weights_that_were_fetched(offline):
    assert open_run("laptop").recipe.model.label == "smollm2"
    fetch.fetch("smollm2", log=list)
    assert open_run("laptop").recipe.model.label == "smollm2-135m-instruct-q4_1"


def test_a_model_that_cannot_be_fetched_is_refused_with_those_that_can(results):
    with pytest.raises(RecipeError, match="There is: smollm2"):
        fetch.fetch("gemma")
    assert CliRunner().invoke(cli.app, ["fetch", "gemma"]).exit_code == 2
