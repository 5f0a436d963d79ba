"""Who is let in: the Host that was asked and the key, each as a whole and nothing like it."""

import asyncio
import base64

import pytest
from starlette.datastructures import Headers

from lora_gpt2.serving.answers import ApiError
from lora_gpt2.serving.middleware import PROXY_HEADERS, SAFE_HEADERS, Access, AccessMiddleware, has_key

KEY, ADMIN_KEY = "s3cret:Key", "adm1n"


async def app(scope, receive, send):
    """Stands behind the guard: whoever gets here was let in."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b"inside"})


def knock(guard, host="localhost", authorization=None):
    """Returns status, headers and body of a request; `host` None sends none."""
    headers = [] if host is None else [(b"host", host.encode())]
    headers += [] if authorization is None else [(b"authorization", authorization.encode())]
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
    asyncio.run(guard(scope, receive, send))
    start, *rest = sent
    return start["status"], start["headers"], b"".join(message.get("body", b"") for message in rest)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "box.example",
        "BOX.example:80",
        "second.example",
        "127.0.0.1",
        "127.0.0.1:80",
        "10.1.2.3:9000",
        "[::1]",
        "[::1]:80",
        "[fe80::1]:8000",
    ],
)
def test_our_names_and_any_ip_address_are_answered(host):
    assert knock(AccessMiddleware(app, Access(hosts=("Box.Example", "second.example"))), host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evilbox.example",
        "xlocalhost",
        "x.localhost",
        "a.box.example",
        "",
        None,
        ":80",
        "localhost.evil.example",
        "box.example.evil.example",
        "box.example.",
        "localhost@evil.example",
        "box",
        "example",
        "localhos",
        "ocalhost",
        "localhost:80:90",
        "localhost:80.evil.example",
        "127.0.0.1:x",
        "[localhost]",
        "box.example,evil.example",
        "*",
        "127.0.0.1.evil.example",
        "evil.127.0.0.1",
        "127.0.0.1.nip.io:80",
        "1.2.3",
        "0x7f000001",
        "[::1].evil.example",
        "second",
        "box.example second.example",
        "evil.example",
    ],
)
def test_every_other_name_is_refused_whatever_of_ours_it_holds(host):
    guard = AccessMiddleware(app, Access(hosts=("box.example", "second.example")))
    status, _, body = knock(guard, host)
    assert (status, b"host_not_allowed" in body, b"inside" in body) == (403, True, False)
    assert b"--allow-host" in body
    keyed = AccessMiddleware(app, Access(hosts=("box.example", "second.example"), key=KEY, admin_key=ADMIN_KEY))
    assert knock(keyed, host, f"Bearer {KEY}")[0] == 403, "a key does not help"


def test_a_host_that_was_not_allowed_at_the_start_is_none():
    assert knock(AccessMiddleware(app, Access(hosts=())), "box.example")[0] == 403
    assert knock(AccessMiddleware(app, Access(hosts=())), "localhost")[0] == 200


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    "authorization",
    [
        f"Bearer {KEY}",
        f"bearer {KEY}",
        f"BEARER  {KEY} ",
        basic(f"me:{KEY}"),
        basic(f":{KEY}"),
        basic(f"me:{KEY}").replace("Basic", "basic"),
        f"Bearer {ADMIN_KEY}",
        basic(f"me:{ADMIN_KEY}"),
    ],
)
def test_either_key_opens_as_a_bearer_token_or_as_a_password(authorization):
    assert knock(AccessMiddleware(app, Access(hosts=(), key=KEY, admin_key=ADMIN_KEY)), authorization=authorization)[
        ::2
    ] == (200, b"inside")


NEARLY = [
    "",
    KEY[:-1],
    KEY[:1],
    KEY[1:],
    KEY + "x",
    "x" + KEY,
    KEY + KEY,
    KEY.upper(),
    KEY.lower(),
    KEY.swapcase(),
    KEY[::-1],
    KEY.replace("s", "S", 1),
    f"{KEY} {KEY}",
    f"{KEY},{ADMIN_KEY}",
    f'"{KEY}"',
    KEY.partition(":")[0],
    KEY.partition(":")[2],
    ADMIN_KEY[:-1],
    ADMIN_KEY + "x",
    ADMIN_KEY.upper(),
    "None",
    "*",
    "\u00e9",
]


@pytest.mark.parametrize("key", NEARLY)
def test_nothing_but_the_whole_key_opens(key):
    guard = AccessMiddleware(app, Access(hosts=(), key=KEY, admin_key=ADMIN_KEY))
    for authorization in (f"Bearer {key}", basic(f"me:{key}"), basic(f":{key}"), basic(f"{KEY}:{key}")):
        status, headers, body = knock(guard, authorization=authorization)
        assert (status, b"invalid_api_key" in body, b"inside" in body) == (401, True, False), authorization
        assert (b"www-authenticate", b'Basic realm="lora-gpt2"') in headers


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Basic",
        KEY,
        f"Token {KEY}",
        f"Bearer:{KEY}",
        f"Bearer{KEY}",
        "Basic ???",
        f"Basic {KEY}",
        basic(KEY),
        basic("me:") + "=",
        f"Digest {KEY}",
        basic(f"me:{KEY}").replace("Basic", "Bearer"),
    ],
)
def test_a_key_in_another_place_or_none_opens_nothing(authorization):
    assert (
        knock(AccessMiddleware(app, Access(hosts=(), key=KEY, admin_key=ADMIN_KEY)), authorization=authorization)[0]
        == 401
    )


def test_without_a_key_everything_is_open_and_the_admin_key_alone_closes_nothing():
    for guard in (AccessMiddleware(app, Access(hosts=())), AccessMiddleware(app, Access(admin_key=ADMIN_KEY))):
        for authorization in (None, "Bearer wrong"):
            assert knock(guard, authorization=authorization)[0] == 200
    only = AccessMiddleware(app, Access(key=KEY))
    assert [knock(only, authorization=value)[0] for value in (f"Bearer {KEY}", "Bearer ", "Bearer None")] == [
        200,
        401,
        401,
    ]


@pytest.mark.parametrize("key", NEARLY)
def test_one_key_is_not_another(key):
    """What guards the admin routes as well."""
    headers = Headers({"authorization": f"Bearer {ADMIN_KEY}"})
    assert has_key(headers, ADMIN_KEY)
    assert not has_key(headers, KEY)
    assert not has_key(Headers({"authorization": f"Bearer {key}"}), KEY)


def test_every_answer_has_the_safe_headers_refusals_included():
    guard = AccessMiddleware(app, Access(key=KEY))
    answers = [knock(guard), knock(guard, "evil.example"), knock(guard, authorization=f"Bearer {KEY}")]
    assert [answer[0] for answer in answers] == [401, 403, 200]
    for _, headers, _ in answers:
        assert set(SAFE_HEADERS) <= set(headers)
    assert dict(SAFE_HEADERS) == {
        b"x-content-type-options": b"nosniff",
        b"referrer-policy": b"no-referrer",
        b"content-security-policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    }
    assert (b"x-own", b"1") in answers[2][1], "those of the application stay"


def control(access, **headers):
    """Returns the status that a request to start or stop training gets."""
    try:
        access.check_control(Headers(headers={name.replace("_", "-"): value for name, value in headers.items()}))
    except ApiError as error:
        return error.status
    return 200


def test_training_is_controlled_from_this_machine_or_with_the_admin_key():
    assert control(Access(is_local=True)) == 200
    assert control(Access(is_local=True), host="localhost:1", origin="http://localhost:1") == 200, "our own page"
    assert control(Access(is_local=True), host="localhost:1", origin="https://app.example") == 403
    assert control(Access(is_local=True, key=KEY), authorization=f"Bearer {KEY}") == 403, "others have it"
    assert control(Access()) == 403, "other machines reach it"
    assert control(Access(key=KEY), authorization=f"Bearer {KEY}") == 403, "the key to generate is not enough"
    for header in PROXY_HEADERS:
        assert control(Access(is_local=True), **{header: "10.0.0.1"}) == 403, "a proxy lets others in"
    for access in (Access(admin_key=ADMIN_KEY), Access(admin_key=ADMIN_KEY, is_local=True)):
        assert control(access) == 401
        assert control(access, authorization=f"Bearer {KEY}") == 401
        assert control(access, authorization=f"Bearer {ADMIN_KEY}") == 200
        assert control(access, authorization=f"Bearer {ADMIN_KEY}", via="1.1 proxy") == 200
