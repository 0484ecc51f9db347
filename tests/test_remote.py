"""An engine behind HTTP, against a server of ours that answers with the tiny model."""

import base64
import functools
import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slots import GROUP, HOW, KEYS, TREES, run, same, talker

from jaxvid.data import records
from jaxvid.rollout import remote, sampler
from jaxvid.rollout.sampler import Prompt, Sampling

SECRET = "sk-not-to-be-seen"
CLIP = records.Media("clip", "video", b"....ftypisom and a film")
STILL = records.Media("still", "image", b"\x89PNG and a picture")
PROMPTS = [Prompt(TREES[0], "0", (CLIP,)), Prompt(TREES[1], "1"), Prompt(TREES[2], "2", (STILL,))]
BITS = jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(KEYS[:3])
SEEDS = (np.asarray(BITS) >> 1).tolist()


class Handler(http.server.BaseHTTPRequestHandler):
    """What vLLM answers, by `server.form`: with token ids in one of two places, or with text."""

    def do_POST(self):
        self.server.heads.append(dict(self.headers))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.faults:
            return self.say(self.server.faults.pop(0), {"error": "busy or forbidden"})
        row = int(body["messages"][0]["content"][-1]["text"])
        out = self.server.replies
        choices = []
        for g in range(body["n"] - self.server.short):
            n = int(out.length[row, g])
            ids, logp = out.tokens[row, g, :n].tolist(), out.logp[row, g, :n].tolist()
            named = [{"token": f"token_id:{i}", "logprob": p} for i, p in zip(ids, logp)]
            choice = {
                "index": g,
                "finish_reason": "stop" if out.ended[row, g] else "length",
                "message": {"content": talker().decode(ids)},
            }
            if self.server.form == "text":
                choice["logprobs"] = None
            else:
                choice["logprobs"] = {"content": named}
            if self.server.form == "ids":
                choice["token_ids"] = ids
            choices.insert(0, choice)  # in no order
        answer = {"choices": choices}
        if self.server.form == "ids":
            answer["prompt_token_ids"] = TREES[row].prompt.tolist()[self.server.lost :]
        return self.say(200, answer)

    def say(self, status, answer):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@functools.cache
def replies():
    return sampler.Rollouts(*(leaf[:3] for leaf in run(0)[0]))


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.form, server.faults, server.short, server.lost = "ids", [], 0, 0
    server.bodies, server.heads, server.replies = [], [], replies()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def engine(server, **changes):
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    return remote.Server(url, "tiny", talker(), **{"wait": 0.01, "timeout": 30.0} | changes)


def ask(engine, prompts=PROMPTS, **changes):
    sampling = Sampling(max_tokens=HOW.max_tokens, **changes)
    return engine(prompts, sampling, group=GROUP, keys=KEYS[: len(prompts)])


@pytest.mark.parametrize("form", ["ids", "names"])
def test_replies_are_those_of_the_server(server, form):
    server.form = form
    same(ask(engine(server)), server.replies, 1e-6)


def test_the_request_says_everything(server):
    extra = {"mm_processor_kwargs": {"fps": 2}}
    cuts = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "stop": ("wall",)}
    ask(engine(server, extra=extra), **cuts)
    bodies = {b["messages"][0]["content"][-1]["text"]: b for b in server.bodies}
    assert sorted(bodies) == ["0", "1", "2"]
    film, still = (bodies[i]["messages"][0]["content"][0] for i in "02")
    assert film["type"] == "video_url" and still["type"] == "image_url"
    for part, kind, medium in ((film, "video/mp4", CLIP), (still, "image/png", STILL)):
        head, data = part[part["type"]]["url"].split(",")
        assert head == f"data:{kind};base64" and base64.b64decode(data) == medium.data
    body = bodies["1"]
    wanted = {"n": GROUP, "model": "tiny", "max_tokens": HOW.max_tokens, "logprobs": True} | extra
    wanted |= {**cuts, "stop": ["wall"], "include_stop_str_in_output": True, "seed": SEEDS[1]}
    assert {name: body[name] for name in wanted} == wanted
    assert set(body["logit_bias"]) == set(map(str, talker().banned_ids))


def test_log_probs_at_other_temperatures_are_not_known(server):
    out = ask(engine(server), temperature=0.7)
    np.testing.assert_array_equal(out.tokens, server.replies.tokens)
    for logp, n in zip(out.logp.reshape(6, -1), out.length.ravel()):
        assert np.isnan(logp[:n]).all() and (logp[n:] == 0).all()


def test_text_alone_is_tokenised_again(server):
    server.form = "text"
    with pytest.warns(UserWarning, match="gives no token ids"):
        out = ask(engine(server))
    theirs = server.replies
    for at in np.ndindex(out.length.shape):
        ids = talker().encode(talker().decode(theirs.tokens[at][: theirs.length[at]]))
        ids = [*ids, *talker().stop_ids[:1]] if theirs.ended[at] else ids
        n = min(len(ids), HOW.max_tokens)
        assert out.tokens[at][:n].tolist() == ids[:n] and out.length[at] == n
        assert np.isnan(out.logp[at][:n]).all() and (out.logp[at][n:] == 0).all()
        assert out.ended[at] == (theirs.ended[at] and len(ids) == n)


def test_a_server_that_is_busy_is_asked_again(server):
    server.faults = [503, 429]
    same(ask(engine(server, parallel=1)), server.replies, 1e-6)
    assert len(server.bodies) == 5


def test_faults_name_the_server_and_what_it_said(server, tmp_path):
    server.faults = [401]
    (tmp_path / "key").write_text(SECRET + "\n")
    client = engine(server, key_file=str(tmp_path / "key"))
    with pytest.raises(RuntimeError, match=r"127.0.0.1.*answered 401 .*forbidden.*try 1 of") as e:
        ask(client, PROMPTS[:1])
    assert server.heads[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in str(e.value) + repr(client) + repr(engine(server, key=SECRET))
    server.faults = [500] * 9
    with pytest.raises(RuntimeError, match=r"answered 500 .*try 3 of 3"):
        ask(engine(server, tries=3), PROMPTS[:1])
    server.faults, server.short = [], 1
    with pytest.raises(ValueError, match="gave 1 replies and was asked for 2"):
        ask(engine(server), PROMPTS[:1])
    server.short, server.lost = 0, 1
    with pytest.raises(ValueError, match="mm_processor_kwargs"):
        ask(engine(server), PROMPTS[:1])
    assert ask(engine(server, check=False), PROMPTS[:1]).ended.shape == (1, GROUP)
    with pytest.raises(ValueError, match="has no text for a server"):
        ask(engine(server), [Prompt(TREES[0])])


def test_a_server_that_is_not_there_is_named():
    client = remote.Server("http://127.0.0.1:9", "tiny", talker(), tries=2, wait=0.0)
    with pytest.raises(RuntimeError, match="127.0.0.1:9.* did not answer.*try 2 of 2"):
        ask(client, PROMPTS[:1])
    for wrong in ({"url": "host:80"}, {"tries": 0}, {"key": "a", "key_file": "b"}):
        with pytest.raises(ValueError, match="wanted|give one"):
            remote.Server(**{"url": "http://host", "model": "m", "chat": talker()} | wrong)
