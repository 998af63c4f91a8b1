import stat

from istiod_py.tokens import PodName, TokenStore


def _tokens(directory):
    return {file.name.removesuffix(".token"): file.read_text() for file in directory.glob("*.token")}


def test_each_node_has_one_secret_file_of_its_own(tmp_path):
    directory = tmp_path / "tokens"
    store = TokenStore(directory)
    store.reconcile(["n1", "n2"])
    tokens = _tokens(directory)
    assert set(tokens) == {"n1", "n2"}
    assert tokens["n1"] != tokens["n2"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for file in directory.glob("*.token"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(file.read_bytes()) >= 43
        assert not file.read_bytes().endswith(b"\n")
    assert store.find_holder(tokens["n1"]) == "n1"
    assert store.find_holder(tokens["n2"]) == "n2"


def test_what_is_no_token_belongs_to_nobody(tmp_path):
    store = TokenStore(tmp_path)
    store.reconcile(["n1"])
    token = _tokens(tmp_path)["n1"]
    for wrong in ("", token[:-1], token + "x", token.lower(), "n1", "\ud800"):
        assert store.find_holder(wrong) is None


def test_tokens_survive_a_restart_and_end_with_their_node(tmp_path):
    TokenStore(tmp_path).reconcile(["n1", "n2"])
    before = _tokens(tmp_path)
    store = TokenStore(tmp_path)
    store.reconcile(["n1", "n3"])
    after = _tokens(tmp_path)
    assert after["n1"] == before["n1"]
    assert set(after) == {"n1", "n3"}
    assert store.find_holder(before["n2"]) is None
    store.reconcile(["n1", "n2", "n3"])
    assert _tokens(tmp_path)["n2"] != before["n2"], "a node that comes back is another node"


def test_a_token_that_others_could_read_or_that_is_empty_is_replaced(tmp_path):
    TokenStore(tmp_path).reconcile(["n1", "n2"])
    before = _tokens(tmp_path)
    (tmp_path / "n1.token").chmod(0o644)
    (tmp_path / "n2.token").write_text("")
    store = TokenStore(tmp_path)
    store.reconcile(["n1", "n2"])
    after = _tokens(tmp_path)
    assert after["n1"] != before["n1"]
    assert store.find_holder(before["n1"]) is None
    assert store.find_holder("") is None
    assert store.find_holder(after["n2"]) == "n2"
    assert stat.S_IMODE((tmp_path / "n1.token").stat().st_mode) == 0o600


def test_a_node_name_that_is_no_name_gets_no_file(tmp_path):
    directory = tmp_path / "tokens"
    TokenStore(directory).reconcile(["../evil", "a/b", "", ".", "UPPER", "n1\n", "ok.example-1"])
    assert set(_tokens(directory)) == {"ok.example-1"}
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_a_pod_has_a_token_of_its_own_until_it_goes(tmp_path):
    store = TokenStore(tmp_path)
    store.reconcile(["n1"], [PodName("shop", "waypoint-0")])
    tokens = _tokens(tmp_path)
    assert set(tokens) == {"n1", "pod_shop_waypoint-0"}
    assert store.find_holder(tokens["pod_shop_waypoint-0"]) == PodName("shop", "waypoint-0")
    store.reconcile(["n1"])
    assert set(_tokens(tmp_path)) == {"n1"}
    assert store.find_holder(tokens["pod_shop_waypoint-0"]) is None


def test_no_name_of_a_pod_leads_out_of_the_directory(tmp_path):
    store = TokenStore(tmp_path / "tokens")
    store.reconcile([], [PodName("../x", "y"), PodName("shop", "../../y"), PodName("a_b", "c")])
    assert _tokens(tmp_path / "tokens") == {}
