"Runs for everybody: AutoModel with this package and without, what is published and what is not, to a hub and back."
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
import yaml

from nanollada.backbone import Backbone, load_run, preset, save_run
from nanollada.core import UserError, make_generator
from nanollada.data import toy_tokenizer
from nanollada.fast import BlockDenoiser
from nanollada.hub import FILES, export, facts, from_hub, hf_model, model_card, modelling_file, public, push_to_hub
from nanollada.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"diffusion": {}, "joint": dict(shift=True), "tied": dict(tie_word_embeddings=True), "editing": dict(edits=True, shift=True),
         "grouped": dict(num_key_value_heads=2, qk_norm=False), "block": dict(objective="block", block_length=4),
         "causal block": dict(objective="block", block_length=4, causal_clean=True)}
RECORD = {"steps": 30, "batch_size": 16, "seed": 7, "saved": 20, "torch": "2.13", "device": None,
          "pretrain": {"data": "/home/lucy/secret/stories.txt", "objective": "joint", "init_from": "/home/lucy/runs/ar", "tokenizer": "owner/words"},
          "fixed": {"text": "25650 tokens, bc48", "length": 58}}
METRICS = [{"step": 10, "split": "valid", "loss": 4.25, "standard_error": 0.5, "seconds": 1.5},
           {"step": 20, "split": "valid", "loss": 3.5, "standard_error": 0.125, "seconds": 3.25}]


def make(folder, record=RECORD, metrics=METRICS, **cfg):
    words = toy_tokenizer()
    torch.manual_seed(0)
    shape = dict(mask_token_id=words.mask_token_id, max_position_embeddings=96, initializer_range=0.1) | cfg
    model = Backbone(preset("toy", len(words), **shape)).eval()
    save_run(model, words, folder)
    if record is not None:
        (folder / "train_config.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return model, words


def example(words, rows=2, length=21):
    ids = torch.randint(4, len(words), (rows, length), generator=make_generator(0))
    ids[:, 9:14] = words.mask_token_id
    real = torch.ones_like(ids)
    real[1, :3] = 0
    return ids, real


def python(code, folder, **environment):
    "Run code in a fresh Python that sees this checkout; what it printed."
    plain = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    settings = plain | {"HF_HOME": str(folder / "hf_home"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=folder, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_answers_as_our_denoiser(tmp_path, kind):
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
    model, words = make(tmp_path / "run", **KINDS[kind])
    ids, real = example(words)
    run, _, _ = load_run(tmp_path / "run", "cpu")
    ours = BlockDenoiser(run) if "block" in kind else run.denoise
    for auto in (AutoModel, AutoModelForMaskedLM):
        opened = auto.from_pretrained(tmp_path / "run")
        with torch.no_grad():
            assert torch.equal(opened(ids).logits, ours(ids)) and ours(ids).std() > 0.05
            assert torch.equal(opened(input_ids=ids, attention_mask=real).logits, ours(ids, real))
        assert not opened.training
    cfg = AutoConfig.from_pretrained(tmp_path / "run")
    assert (cfg.model_type, cfg.hidden_size, cfg.objective) == ("nanollada", 128, run.cfg.objective)
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == (kind == "tied")


@pytest.mark.parametrize("kind", ["joint", "tied", "causal block"])
def test_what_transformers_saves_is_a_run_again(tmp_path, kind):
    from transformers import AutoModel, AutoTokenizer
    model, words = make(tmp_path / "run", **KINDS[kind])
    opened = AutoModel.from_pretrained(tmp_path / "run")
    opened.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "again")
    again, _, _ = load_run(tmp_path / "again", "cpu")
    assert again.cfg == model.cfg and str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    ids, real = example(words)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "again")(ids, real).logits, opened(ids, real).logits)


def test_dtype_device_and_labels(tmp_path):
    from transformers import AutoModel
    model, words = make(tmp_path / "run", **KINDS["joint"])
    ids, _ = example(words)
    half = AutoModel.from_pretrained(tmp_path / "run", dtype=torch.bfloat16, device_map="cpu")
    run, _, _ = load_run(tmp_path / "run", "cpu", torch.bfloat16)
    with torch.no_grad():
        assert half.dtype == torch.bfloat16 and torch.equal(half(ids).logits, run.denoise(ids))
    opened, labels = AutoModel.from_pretrained(tmp_path / "run"), torch.full_like(ids, -100)
    labels[0, 10], labels[1, 12] = 5, 6
    found = opened(ids, labels=labels)
    p = found.logits.log_softmax(-1)
    assert torch.allclose(found.loss, -(p[0, 10, 5] + p[1, 12, 6]) / 2)
    found.loss.backward()
    assert opened.model.embed_tokens.weight.grad.abs().sum() > 0
    assert isinstance(opened(ids, return_dict=False), tuple) and len(opened(ids, labels=labels, return_dict=False)) == 2
    with pytest.raises(TypeError):
        opened(ids, position_ids=ids)  # what it does not know it does not ignore


def test_a_new_model_begins_as_the_backbone_does(tmp_path):
    from transformers import AutoConfig, AutoModelForMaskedLM
    make(tmp_path / "run", tie_word_embeddings=True)
    new = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tmp_path / "run"))
    plain = Backbone(new.cfg)
    for name, weight in plain.named_parameters():
        assert new.get_parameter(name).std().item() == pytest.approx(weight.std().item(), abs=0.01), name
    assert torch.equal(new.model.frequencies, plain.model.frequencies)


def test_ar_runs_open_as_ever_and_bad_configs_say_why(tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM
    model, words = make(tmp_path / "ar", objective="ar", qk_norm=True)
    ids, _ = example(words)
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "ar")(ids).logits, model(ids, True), atol=1e-5)
    make(tmp_path / "run")
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run")  # nothing opens it as a causal one
    entries = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(entries | {"hidden_size": 127}))
    with pytest.raises(UserError, match="hidden_size 127"):
        AutoModel.from_pretrained(tmp_path / "run")


def test_the_pipeline_fills_a_mask(tmp_path):
    from transformers import pipeline
    model, words = make(tmp_path / "run", **KINDS["joint"])
    found = pipeline("fill-mask", str(tmp_path / "run"), tokenizer=words)("Lily <|mask|>", top_k=1)[0]
    ids = words("Lily <|mask|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert found["token"] == model.denoise(ids)[0, (ids[0] == words.mask_token_id).nonzero()[0, 0]].argmax()


OPEN = """
import torch
print(type(AutoConfig.from_pretrained("out")).__module__)
model = AutoModelForMaskedLM.from_pretrained("out")
print(type(model).__module__, model(torch.arange(8)[None]).logits.sum().item())
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained("out").mask_token_id)
"""


@pytest.mark.parametrize("first", ["import nanollada\nfrom transformers import AutoConfig, AutoModelForMaskedLM",
                                   "from transformers import AutoConfig, AutoModelForMaskedLM\nimport nanollada",
                                   "from transformers import AutoConfig\nimport nanollada.core\nfrom transformers import AutoModelForMaskedLM"])
def test_whichever_is_imported_first_and_what_the_folder_brings_is_not_run(tmp_path, first):
    model, words = make(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "modeling_nanollada.py").write_text("raise SystemExit('executed')")
    lines = python(first + OPEN, tmp_path).split()
    with torch.no_grad():
        assert lines[:2] == ["nanollada.hub"] * 2 and float(lines[2]) == pytest.approx(model.denoise(torch.arange(8)[None]).sum().item(), abs=0.01)
    assert lines[3] == str(words.mask_token_id) and load_run(tmp_path / "out", "cpu")[2]["training"]["seed"] == 7


def test_the_hook_waits(tmp_path):
    said = python("import nanollada, sys; print(*[m for m in ('torch', 'transformers', 'nanollada.hub') if m in sys.modules])\n"
                  "import transformers; print('nanollada.hub' in sys.modules)", tmp_path)
    assert said.splitlines() == ["", "False"]


WITHOUT = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "nanollada":
            raise ImportError("nanollada is not installed")
sys.meta_path.insert(0, Absent)
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
for kind in torch.load("in.pt"):
    open_it = dict(pretrained_model_name_or_path=kind, trust_remote_code=True)
    ids, words = torch.load("in.pt")[kind], AutoTokenizer.from_pretrained(**open_it)
    models = [auto.from_pretrained(**open_it) for auto in (AutoModel, AutoModelForMaskedLM)]
    torch.save([model(**ids).logits.detach() for model in models], kind + ".pt")
    print(words("Lily")["input_ids"])
print([name for name in sys.modules if name.startswith("nanollada")])
"""


def test_the_copied_file_opens_it_without_the_package(tmp_path):
    ours, given = {}, {}
    for kind in ("joint", "tied", "causal block"):
        model, words = make(tmp_path / "runs" / kind, **KINDS[kind])
        export(tmp_path / "runs" / kind, tmp_path / kind.replace(" ", "_"))
        ids, real = example(words)
        given[kind.replace(" ", "_")] = {"input_ids": ids, "attention_mask": real}
        with torch.no_grad():
            ours[kind.replace(" ", "_")] = (BlockDenoiser(model) if "block" in kind else model.denoise)(ids, real)
    torch.save(given, tmp_path / "in.pt")
    said = python(WITHOUT, tmp_path, PYTHONPATH="").splitlines()
    for kind in given:
        assert all(torch.equal(logits, ours[kind]) for logits in torch.load(tmp_path / f"{kind}.pt"))
    assert said == [str(load_tokenizer(tmp_path / "runs" / "joint")("Lily")["input_ids"])] * 3 + ["[]"]


def test_the_copied_file_is_the_source_and_stands_alone():
    text = modelling_file()
    for name in ("backbone", "fast", "core"):
        assert not re.search(rf"^(from|import) .*\b{name}\b", text, re.M)
    source = (ROOT / "nanollada" / "backbone.py").read_text()
    assert source[source.index("class Attention("):source.index("# %% ../nbs/04_backbone.ipynb #FeedForward")].rstrip() in text
    space = {"__name__": "modeling_nanollada_alone"}
    sys.modules["modeling_nanollada_alone"] = type(sys)("modeling_nanollada_alone")
    exec(compile(text, "modeling_nanollada.py", "exec"), space)
    assert space["NanolladaForMaskedLM"] is not hf_model()


def test_a_record_is_published_without_folders():
    there = str(ROOT)
    told = public({"out": "/home/lucy/runs/x/", "data": "owner/stories:v1", "tokenizer": "owner/words", "init_from": "lucy/ar", "fixed": {"data": "lucy/a.txt"}, "cache": r"C:\Users\lucy\cache", "n": 3, "b": None,
                   "list": ["~/a/b.txt", "plain"], "deep": {"init_from": "runs/../../ar", "here": there}})
    assert told == {"out": "x", "data": "owner/stories:v1", "tokenizer": "owner/words", "init_from": "ar", "fixed": {"data": "a.txt"}, "cache": "cache", "n": 3, "b": None, "list": ["b.txt", "plain"],
                    "deep": {"init_from": "ar", "here": ROOT.name}}


def test_the_card_says_what_the_record_knows(tmp_path):
    make(tmp_path / "run", **KINDS["joint"])
    card = model_card(tmp_path / "run", "apache-2.0", "me/run")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "nanollada", "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["nanollada", "masked-diffusion"]}
    rows = dict(re.findall(r"^\| (.+?) \| `(.*)` \|$", card, re.M))
    assert (rows["data"], rows["begun from"], rows["seed"], rows["updates"], rows["seconds"]) == ("stories.txt", "ar", "7", "20", "3")
    assert rows["tokens seen, at most"] == f"{20 * 16 * 58:,}" and rows["its text"] == "25650 tokens, bc48"
    assert rows["validation"] == "3.5000 nats a scored token, standard error 0.1250 (NELBO, an upper bound of the NLL)"
    model, _, _ = load_run(tmp_path / "run", "cpu")
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert 'AutoModelForMaskedLM.from_pretrained("me/run")' in card and "lucy" not in card


@pytest.mark.parametrize("change, cfg, said", [
    (dict(pretrain={"objective": "ar"}), dict(objective="ar"), "(NLL, exact)"),
    (dict(pretrain={"objective": "diffusion"}), {}, "(NELBO, an upper bound of the NLL)"),
    (dict(pretrain={"objective": "joint"}), dict(edits=True), "no likelihood"),
    (dict(pretrain={"objective": "block"}), KINDS["block"], "no likelihood"),
    (dict(pretrain=None, sft={"data": "chat.jsonl"}), {}, "no likelihood"), (dict(saved=11), {}, "unknown"), (dict(saved=None), {}, "unknown")])
def test_a_likelihood_a_bound_or_neither(tmp_path, change, cfg, said):
    make(tmp_path / "run", RECORD | change, **cfg)
    assert said in facts(tmp_path / "run")["validation"]
    card, ar = model_card(tmp_path / "run"), cfg.get("objective") == "ar"
    assert ("AutoModelForCausalLM" in card) == ar and ("import nanollada" in card) != ar


def test_a_folder_without_a_record_is_unknown_and_not_guessed(tmp_path):
    make(tmp_path / "run", None)
    told = facts(tmp_path / "run")
    assert {name for name, value in told.items() if value == "unknown"} == {"data", "its text", "begun from", "updates", "tokens seen, at most",
                                                                            "seconds", "seed", "validation"}
    assert "license: unknown" in model_card(tmp_path / "run")


def test_a_record_cannot_write_into_the_card(tmp_path):
    evil = "a\n---\nlicense: mit\n# Pwned\n| x | `<script>` [click](http://evil) \x1b[2J\u202e {rows}"
    make(tmp_path / "run", RECORD | {"pretrain": {"data": evil, "objective": evil}, "seed": evil, "fixed": {"text": evil, "length": 58}})
    quiet = tmp_path / "quiet"
    make(quiet)
    card, plain = model_card(tmp_path / "run"), model_card(quiet)
    assert len(card.splitlines()) == len(plain.splitlines()) and yaml.safe_load(card.split("---")[1])["license"] == "unknown"
    for line in card.splitlines():
        if "Pwned" in line or "evil" in line:
            assert re.fullmatch(r"\| [\w ,]+ \| `[^`|]*` \|", line), line
    assert "\x1b" not in card and "\u202e" not in card
    with pytest.raises(UserError, match="license is"):
        model_card(quiet, "mit\ntags: [x]")
    with pytest.raises(UserError, match="owner/name"):
        model_card(quiet, place='me/run")\nimport os')


def test_an_export_has_what_it_should_and_nothing_else(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "state" / "step-1").mkdir(parents=True)
    for name in ("state/step-1/optimizer.pt", "notes.txt", "loss.png", ".lock"):
        (tmp_path / "run" / name).write_text("private")
    export(tmp_path / "run", tmp_path / "out", "hf")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*FILES, "modeling_nanollada.py"}
    assert "lucy" not in "".join(p.read_text("utf-8", "replace") for p in (tmp_path / "out").glob("*.json*"))
    make(tmp_path / "ar", objective="ar")
    export(tmp_path / "ar", tmp_path / "ar_out")
    assert {p.name for p in (tmp_path / "ar_out").iterdir()} == {*FILES} - {"loss.png"}
    with pytest.raises(UserError, match="is there already"):
        export(tmp_path / "run", tmp_path / "out", "hf")
    with pytest.raises(UserError, match="format is 'gguf'; expected hf, llada, gguf-ready, sdar"):
        export(tmp_path / "run", tmp_path / "x", "gguf")


class Hub(BaseHTTPRequestHandler):
    "As much of the hub's protocol as a push and a fetch of one repository need."
    def log_message(self, *_):
        pass

    def answer(self, body, code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        path, hub = urlparse(self.path).path, self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            hub.private.setdefault(name, bool(wanted.get("private")) or wanted.get("visibility") == "private")
            return self.answer({"url": f"http://127.0.0.1:{hub.server_port}/{name}"})
        if "/preupload/" in path:
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            return self.answer({"commitUrl": f"http://127.0.0.1:{hub.server_port}/me/run/commit/{SHA}", "commitOid": SHA})
        return self.answer({"warnings": [], "errors": []})  # validate-yaml

    def do_GET(self):
        path, hub = unquote(urlparse(self.path).path), self.server
        hub.asked.append(path)
        if "/resolve/" in path:
            body = hub.files.get(path.split("/", 5)[-1])
            if body is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            return self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=SHA)
        if "/tree/" in path:
            return self.answer([{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()} for name, body in hub.files.items()])
        name = "/".join(path.split("/")[3:5])
        if name not in hub.private:
            return self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        return self.answer({"id": name, "sha": SHA, "private": hub.private[name], "siblings": [{"rfilename": each} for each in hub.files]})

    do_HEAD = do_GET


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.private, server.asked = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def online(hub, token="hf_test"):
    return {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}


def test_to_the_hub_and_back(tmp_path, hub):
    model, words = make(tmp_path / "run", **KINDS["joint"])
    (tmp_path / "run" / "notes.txt").write_text("private")
    ids, real = example(words)
    torch.save([ids, real], tmp_path / "in.pt")
    code = """
import torch
from nanollada.hub import push_to_hub, from_hub
from transformers import AutoModel
print(push_to_hub("run", "me/run", license="mit"))
ids, real = torch.load("in.pt")
model, words, info = from_hub("me/run", device="cpu", revision="main")
print(info["training"]["seed"], words.mask_token_id)
torch.save([model.denoise(ids, real), AutoModel.from_pretrained("me/run")(ids, real).logits], "back.pt")
"""
    said = python(code, tmp_path, **online(hub)).split()
    assert said[0].endswith("/me/run") and said[1:] == ["7", str(words.mask_token_id)]
    assert set(hub.files) == {*FILES, "modeling_nanollada.py"} - {"loss.png"} and b"lucy" not in b"".join(hub.files.values())
    assert b"license: mit" in hub.files["README.md"] and b'from_pretrained("me/run")' in hub.files["README.md"]
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert fetched and not [path for path in fetched if path.endswith(".py")]
    for logits in torch.load(tmp_path / "back.pt"):
        assert torch.equal(logits, model.denoise(ids, real).detach())


def test_what_should_be_private_is_not_put_where_all_see_it(tmp_path, hub):
    make(tmp_path / "run")
    hub.private["me/run"] = False
    code = """
from nanollada.core import UserError
from nanollada.hub import push_to_hub, from_hub
for task in (lambda: push_to_hub("run", "me/run", private=True), lambda: from_hub("me/absent"), lambda: push_to_hub("run", "no name!")):
    try:
        print("done", task())
    except UserError as error:
        print(error)
print(push_to_hub("run", "me/other", private=True))
"""
    said = python(code, tmp_path, **online(hub)).splitlines()
    assert "is there and public" in said[0] and "not here nor on the hub" in said[1] and "owner/name" in said[2]
    assert said[3].endswith("/me/other") and hub.private["me/other"]
    assert not any(path.startswith("/api/models/me/run/commit") for path in hub.asked)


def test_without_a_hub_it_says_so(tmp_path):
    make(tmp_path / "run")
    with pytest.raises(UserError, match="not published"):
        push_to_hub(tmp_path / "run", "me/run")
    with pytest.raises(UserError, match="not here nor on the hub"):
        from_hub("me/run")
