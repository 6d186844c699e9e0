"""SCRAM-SHA-256 against the example of RFC 7677, and everything that a server has to refuse."""

from __future__ import annotations

import itertools

import pytest

from mqtt_trio.broker.access import Challenge, Credentials, Denied, Granted, Principal, Step
from mqtt_trio.broker.saslprep import saslprep
from mqtt_trio.broker.scram import ScramClient, ScramCredential, ScramSha256

SALT = b"\x5b\x6d\x99\x68\x9d\x12\x35\x8e\xec\xa0\x4b\x14\x12\x36\xfa\x81"
PENCIL = ScramCredential.derive("pencil", SALT)
CREDENTIALS = Credentials("device", None, None, "peer", "listener")


class Users(dict[str, ScramCredential]):
    def find(self, user_name: str) -> ScramCredential | None:
        return self.get(user_name)


def server(users: dict[str, ScramCredential] | None = None, nonce: str = "server") -> ScramSha256:
    return ScramSha256(Users(users or {"user": PENCIL}), nonce=lambda: nonce, secret=b"secret")


def challenge(step: Step) -> tuple[Challenge, bytes]:
    assert isinstance(step, Challenge)
    assert step.data is not None
    return step, step.data


def denied(step: Step) -> str:
    assert isinstance(step, Denied)
    assert step.reason_code == 0x87
    return step.reason


def test_the_example_of_rfc_7677() -> None:
    scram = server(nonce="%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    asked, data = challenge(scram.start(CREDENTIALS, b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"))
    assert data == b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    final = (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    done = asked.answered(final)
    assert done == Granted(Principal("device", "user"), b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    client = ScramClient("user", "pencil", "rOprNGfwEbeRWgbNEkqO")
    assert client.first() == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    assert client.final(data) == final
    assert isinstance(done, Granted)
    assert client.verify(done.data)
    assert not client.verify(b"v=" + b"A" * 43 + b"=")
    assert not client.verify(None)


@pytest.mark.parametrize("name, sent", [("a,b=c", b"n=a=2Cb=3Dc"), ("Ⅸ", b"n=IX"), ("I\u00adX", b"n=IX")])
def test_user_names_travel_prepared_and_escaped(name: str, sent: bytes) -> None:
    client = ScramClient(name, "pencil", "c")
    assert client.first() == b"n,," + sent + b",r=c"
    scram = server({saslprep(name, stored=False): PENCIL})
    asked, data = challenge(scram.start(CREDENTIALS, client.first()))
    done = asked.answered(client.final(data))
    assert isinstance(done, Granted)
    assert done.principal.user_name == saslprep(name, stored=False)


def test_a_connect_without_data_is_asked_for_it() -> None:
    client = ScramClient("user", "pencil", "c")
    step = server().start(CREDENTIALS, None)
    assert isinstance(step, Challenge)
    assert step.data is None
    asked, data = challenge(step.answered(client.first()))
    assert isinstance(asked.answered(client.final(data)), Granted)
    assert "bytes" in denied(step.answered(None))


@pytest.mark.parametrize(
    "first, why",
    [
        (b"", "bytes"),
        (b"n,,n=user,r=" + b"x" * 5000, "bytes"),
        (b"\xff", "UTF-8"),
        (b"n=user,r=c", "gs2"),
        (b"n,,", "user name"),
        (b"x,,n=user,r=c", "gs2"),
        (b"p=tls-unique,,n=user,r=c", "channel binding"),
        (b"n,a=admin,n=user,r=c", "authorization identity"),
        (b"n,,m=new,n=user,r=c", "mandatory extension"),
        (b"n,,n=user", "nonce"),
        (b"n,,n=,r=c", "empty"),
        (b"n,,n=user,r=", "empty"),
        (b"n,,n=user,r=\xc3\xa9", "printable"),
        (b"n,,n=us=er,r=c", "equals"),
        (b"n,,n=us\x07er,r=c", "U+0007"),
    ],
)
def test_bad_first_messages(first: bytes, why: str) -> None:
    assert why in denied(server().start(CREDENTIALS, first))


@pytest.mark.parametrize(
    "change, why",
    [
        ((b"p=", b"p=-"), "base64"),
        ((b",p=", b",q="), "base64"),
        ((b"c=biws", b"c=eSws"), "does not belong"),
        ((b"r=cserver", b"r=cservfr"), "does not belong"),
        ((b"c=biws,", b""), "does not belong"),
        ((b",p=", b",x=extension,p="), "wrong password"),
    ],
)
def test_bad_final_messages(change: tuple[bytes, bytes], why: str) -> None:
    client = ScramClient("user", "pencil", "c")
    asked, data = challenge(server().start(CREDENTIALS, client.first()))
    final = client.final(data)
    assert final != final.replace(*change)
    assert why in denied(asked.answered(final.replace(*change)))
    assert "proof" in denied(asked.answered(b"c=biws,r=cserver,p=AAAA"))
    assert "bytes" in denied(asked.answered(None))


def test_wrong_passwords_and_unknown_users_look_alike() -> None:
    scram = server()
    reasons = set()
    for user, password in (("user", "pen"), ("nobody", "pencil"), ("nobody", "")):
        client = ScramClient(user, password, "c")
        asked, data = challenge(scram.start(CREDENTIALS, client.first()))
        assert len(data) == len(b"r=cserver,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096")
        reasons.add(denied(asked.answered(client.final(data))))
    assert len(reasons) == 1


def test_the_salt_of_an_unknown_user_is_always_the_same_and_its_own() -> None:
    salts = []
    for secret, user in itertools.product((b"one", b"two"), ("nobody", "nemo")):
        for _ in range(2):
            scram = ScramSha256(Users(), nonce=lambda: "s", secret=secret, iterations=9999)
            salts.append(challenge(scram.start(CREDENTIALS, f"n,,n={user},r=c".encode()))[1])
    assert salts[::2] == salts[1::2]
    assert len(set(salts)) == 4
    assert all(salt.endswith(b",i=9999") for salt in salts)


def test_knowing_what_is_kept_of_nobody_does_not_help() -> None:
    """The made up keys are no way in, even for somebody who has the secret of the node."""
    scram = server()
    scram.credentials = Users()
    fake = scram._fake("nobody")
    scram._fake = lambda user_name: PENCIL  # type: ignore[method-assign]
    client = ScramClient("nobody", "pencil", "c")
    asked, data = challenge(scram.start(CREDENTIALS, client.first()))
    assert "unknown user" in denied(asked.answered(client.final(data)))
    assert fake.iterations == 4096


def test_too_few_iterations_are_refused_on_both_ends() -> None:
    with pytest.raises(ValueError, match="iterations"):
        ScramCredential.derive("pencil", SALT, 4095)
    for bad in (b"r=cserver,s=AAAA,i=4095", b"r=other,s=AAAA,i=4096", b"r=c,s=AAAA,i=4096"):
        with pytest.raises(ValueError, match="not to be trusted"):
            ScramClient("user", "pencil", "c").final(bad)


def test_keys_are_not_shown() -> None:
    shown = repr(PENCIL)
    assert "stored_key" not in shown
    assert "server_key" not in shown


# SASLprep: the examples of RFC 4013, section 3


@pytest.mark.parametrize(
    "text, prepared",
    [("I\u00adX", "IX"), ("user", "user"), ("USER", "USER"), ("\u00aa", "a"), ("\u2168", "IX"), ("a\u00a0b", "a b")],
)
def test_saslprep(text: str, prepared: str) -> None:
    assert saslprep(text, stored=True) == prepared


@pytest.mark.parametrize(
    "text", ["\u0007", "\u0627\u0031", "\u0627a\u0627", "\ue000", "\ufffd", "\u200e", "\U000e0001"]
)
def test_saslprep_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="character"):
        saslprep(text, stored=False)


def test_unassigned_characters_are_only_refused_in_what_is_stored() -> None:
    assert saslprep("\u0221", stored=False) == "\u0221"
    with pytest.raises(ValueError, match="U\\+0221"):
        saslprep("\u0221", stored=True)
