"""Links between GPUs: figures with sources, names as people write them, what cards usually have."""

import pytest

from attention import ConfigError
from planner.gpus import find as card_of
from planner.gpus import generic
from planner.gpus import known as cards
from planner.ranks.links import Network, find, known, network_of

NVLINK, NDR = find("nvlink4"), find("ndr")


@pytest.mark.parametrize("link", known(), ids=lambda link: link.key)
def test_figures_have_sources_and_possible_sizes(link):
    assert 1e-6 < link.alpha < 1e-3
    assert 1e8 < link.beta < 1e12
    assert 0 < link.collectives <= 1
    for source in (link.alpha_source, link.beta_source):
        assert any(word in source for word in ("NCCL", "published", "derived", "measured"))


def test_no_two_links_share_a_name():
    names = [name for link in known() for name in (link.key, *link.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() for name in names)


def test_a_newer_generation_is_faster():
    for family in (
        ("pcie3", "pcie4", "pcie5"),
        ("nvlink2", "nvlink3", "nvlink4", "nvlink5"),
        ("hdr", "ndr", "xdr"),
        ("eth10", "eth25", "eth100", "eth200", "eth400"),
    ):
        rates = [find(key).beta for key in family]
        assert rates == sorted(set(rates))


def test_a_link_is_found_however_it_is_written():
    assert find(" NVLink4 ") is NVLINK
    assert find("InfiniBand") is NDR
    with pytest.raises(ConfigError, match=r"link 'nvlink9' is not known; there are nvlink2, .*, gloo"):
        find("nvlink9")


def test_seconds_are_those_of_messages_and_of_bytes():
    assert NDR.seconds(3, 45e9) == pytest.approx(1 + 3 * 2.24e-5)
    assert NVLINK.seconds(0, 370e9, all_to_all=True) == pytest.approx(1 / 0.6)


@pytest.mark.parametrize(
    "gpus, card, keys, node",
    [
        (8, "h100-sxm", ("nvlink4",), None),
        (16, "h100-sxm", ("nvlink4", "ndr"), 8),
        (12, "a100-sxm4-80gb", ("nvlink3", "hdr"), 4),
        (72, "gb200", ("nvlink5",), None),
        (2, "rtx4090", ("pcie4",), None),
        (8, "h100-pcie", ("pcie5",), None),
    ],
)
def test_what_cards_usually_have(gpus, card, keys, node):
    network = network_of(gpus, card_of(card))
    links = [link.key for link in (network.inside, network.between) if link]
    assert (tuple(links), network.node, network.is_given) == (keys, node, False)


def test_every_card_and_a_cpu_have_a_link():
    for card in (*cards(), generic(8 * 10**9), "cpu"):
        assert network_of(2, card).between is None


def test_links_that_are_named_are_taken():
    card = card_of("rtx4090")
    assert network_of(8, card, "nvlink4") == Network(NVLINK, is_given=True)
    network = network_of(16, card, "nvlink4,ndr", 8)
    assert network == Network(NVLINK, NDR, 8, is_given=True)
    assert network.link(0, 7) is network.link(9, 8) is NVLINK
    assert network.link(7, 8) is NDR
    assert str(network) == (
        "NVLink 4, 18 links a GPU, in nodes of 8; InfiniBand NDR, a 400 Gb/s port a GPU, between them"
    )


@pytest.mark.parametrize(
    "link, node, why",
    [
        ("nvlink4,ndr", 5, "node=5 and gpus=16; use e.g. node=4"),
        ("nvlink4,ndr", 0, "node=0 and gpus=16"),
        ("nvlink4,ndr", None, "give the GPUs of a node too, e.g. node=8"),
        ("nvlink4", 8, "node=8 is for two links"),
        (None, 8, "node=8 is for two links"),
        ("nvlink4,ndr,hdr", 8, "at most two names"),
        ("nvlink4,", 8, "link '' is not known"),
    ],
)
def test_links_that_cannot_be_are_refused(link, node, why):
    with pytest.raises(ConfigError, match=why):
        network_of(16, "cpu", link, node)
