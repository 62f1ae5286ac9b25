"""VoCo as a method: its gradients, its faults of old that must not come back, weights in and out, whole runs."""

import copy

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

import extract_backbone_weights
import main_ddp
from engine.checkpoint import LATEST
from engine.weights import start_from
from losses.overlap import predicted_overlap, spread_term, whole_term
from models.backbones import BACKBONES, segmentation_network
from models.methods import METHODS
from models.methods.voco import VoCo, VoCoOptions, label_floors, partners_of
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS
from models.weights_file import WeightsError, read_weights_file
from tests.launched import two_ranks
from tests.tiny_run import add_store_and_table, log_of, make_corpus

ROI = (16, 16, 16)
NOW = {"step": 0.0}


def small_voco(variant: str = "v2", backbone: str = "unet", feature_size: int = 8, roi=ROI, **options) -> VoCo:
    torch.manual_seed(0)

    def make_backbone(decoder_stride, with_masks, with_skips=False):
        return BACKBONES[backbone](feature_size, roi, decoder_stride, False, with_masks, with_skips)

    return VoCo(VoCoOptions(variant, **({"voco_dim": 16} | options)), make_backbone)


def small_batch(num_volumes: int = 3, num_bases: int = 4, num_crops: int = 2, roi=ROI) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    overlap = torch.rand(num_volumes, num_crops, num_bases, generator=generator)
    overlap = torch.where(overlap < 0.5, 0, overlap)
    shape = (num_volumes, num_bases + num_crops)
    return {
        "view": torch.rand(*shape, 1, *roi, generator=generator),
        "overlap": overlap / overlap.sum(-1, keepdim=True).clamp(min=1e-3),
        "case": torch.arange(num_volumes)[:, None].expand(shape),
    }


@pytest.mark.parametrize(("variant", "backbone"), [
    ("v2", "unet"), ("v1", "unet"), ("paper", "unet"), ("v2", "nnformer"), ("v2", "swin_unetr"),
    ("v1", "swin_unetr_v2"),
])  # fmt: skip
def test_every_trained_weight_gets_a_gradient_and_no_other(variant, backbone):
    roi = (64, 32, 32) if "swin" in backbone else (32, 16, 16)
    method = small_voco(variant, backbone, 12, roi)
    total, terms = method(small_batch(2, 2, 1, roi), NOW)
    total.backward()
    assert all(parameter.grad is not None for parameter in method.student.parameters())
    assert total.item() == pytest.approx(sum(v.item() for name, v in terms.items() if name.startswith("loss_")))
    assert all(not value.requires_grad and torch.isfinite(value) for value in terms.values())
    kept = {name for name, _ in method.named_children()}
    assert kept == ({"student"} if variant == "paper" else {"student", "teacher"})
    if variant != "paper":
        assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
        assert hasattr(method.teacher, "backbone") is (variant == "v1")


def test_the_papers_form_by_its_equations():
    method, batch = small_voco("paper"), small_batch()
    rows = method.student.head(method.student(batch["view"].flatten(0, 1))).unflatten(0, (3, 6))
    bases, crops = rows[:, :4], rows[:, 4:]
    terms = method(batch, NOW)[1]
    cosines = nn.functional.cosine_similarity(crops[:, :, None], bases[:, None], dim=-1)
    expected = -(1 - (batch["overlap"] - cosines.clamp(min=0)).abs() + 1e-6).log().mean()
    assert terms["loss_whole"].item() == pytest.approx(expected.item(), abs=1e-5)
    sizes = [
        nn.functional.cosine_similarity(bases[:, k], bases[:, j], dim=-1).abs() for k in range(4) for j in range(k)
    ]
    assert terms["loss_reg"].item() == pytest.approx(torch.stack(sizes).mean().item(), abs=1e-5)


def test_the_papers_labels_move_crops_only_and_bases_only_by_the_regulariser():
    crops, bases = torch.randn(1, 2, 8, requires_grad=True), torch.randn(1, 4, 8, requires_grad=True)
    whole_term(small_batch(1)["overlap"], predicted_overlap(crops, bases.detach())).mean().backward()
    assert crops.grad.abs().sum() > 0 and bases.grad is None


# Fault 1: dropout of rows


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropout_takes_elements_of_the_students_features_and_only_in_training(share):
    method, batch, seen = small_voco(voco_dropout=share), small_batch(), []
    method.student.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    of_teacher = []
    method.teacher.head.register_forward_pre_hook(lambda module, inputs: of_teacher.append(inputs[0]))
    method(batch, NOW)
    method.eval()(batch, NOW)
    pooled = of_teacher[0]
    lost = (seen[0] == 0) & (pooled != 0)
    assert torch.equal(seen[-1], pooled) and torch.equal(of_teacher[1], pooled)
    if share == 0:
        assert torch.equal(seen[0], pooled)
    else:
        assert lost.float().mean() == pytest.approx(share, abs=0.1)
        assert not lost.all(dim=1).any() and lost.float().mean(dim=1).std() < 0.15  # no row goes as a whole


def test_label_loss_is_that_without_dropout_and_stands_beside_its_floors():
    batch = small_batch()
    without, with_it = (small_voco(voco_dropout=share)(batch, NOW)[1] for share in (0.0, 0.5))
    assert with_it["label_loss"] == pytest.approx(without["label_loss"].item(), abs=1e-6)
    assert without["label_loss"] == without["loss_intra"] and with_it["loss_intra"] != with_it["label_loss"]
    assert with_it["label_loss_at_constant"] < with_it["label_loss_at_zero"]


@pytest.mark.parametrize(("variant", "at_zero"), [("v2", 0.5 * 2 * 0.6931472), ("paper", 2 / 3 * 0.6931472)])
def test_floors_by_hand(variant, at_zero):
    """One crop, half on each of two bases, none on a third."""
    floors = label_floors(variant, torch.tensor([[[0.5, 0.5, 0.0]]]))
    assert floors["label_loss_at_zero"].item() == pytest.approx(at_zero, abs=1e-4)
    assert 0 < floors["label_loss_at_constant"] < floors["label_loss_at_zero"]


# Fault 2: uneven gradients of the bases


def test_the_regulariser_moves_all_bases_alike():
    bases = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)) + 1.0
    order = torch.tensor([4, 2, 0, 1, 3])
    gradients = {}
    for both in (True, False):
        for name, chosen in (("plain", bases), ("reordered", bases[:, order])):
            leaf = chosen.clone().requires_grad_()
            spread_term(leaf, both=both).sum().backward()
            gradients[both, name] = leaf.grad
    torch.testing.assert_close(gradients[True, "plain"][:, order], gradients[True, "reordered"])
    assert (gradients[True, "plain"].norm(dim=-1) > 0).all()
    assert gradients[False, "plain"][0, -1].norm() == 0  # as released, with --voco_even_bases false
    assert VoCoOptions().voco_even_bases
    torch.testing.assert_close(spread_term(bases), spread_term(bases, both=False))


# Fault 3: the teacher's start, and what moves it


@pytest.mark.parametrize("variant", ["v2", "v1"])
def test_teacher_starts_as_a_copy_and_moves_after_steps_alone(variant):
    method, batch = small_voco(variant, momentum_teacher=0.75), small_batch()
    own = method.teacher.state_dict()
    for name, value in own.items():
        assert torch.equal(value, method.student.state_dict()[name])
    before = copy.deepcopy(own)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter += 1.0
    method(batch, NOW)
    method.eval()(batch, NOW)
    method.after_step(NOW, was_skipped=torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    method.after_step(NOW, was_skipped=torch.tensor(False))
    for name, value in method.teacher.state_dict().items():
        moved = before[name] + 0.25 if value.is_floating_point() else before[name]
        torch.testing.assert_close(value, moved)


# Faults 4 and 7: partners


def test_one_volume_is_refused_where_it_would_be_its_own_partner():
    with pytest.raises(ValueError, match="--batch_size 1.*--voco_variant v1"):
        small_voco()(small_batch(1), NOW)
    small_voco("v1")(small_batch(1), NOW)
    batch = small_batch(2)
    paired = {"view": batch["view"].flatten(0, 1)[None], "overlap": batch["overlap"][None]}
    terms = small_voco()(paired | {"case": batch["case"].flatten()[None]}, NOW)[1]  # grid_sam: two volumes
    assert terms["partner_share"] == 1


@pytest.mark.parametrize(
    ("cases", "is_paired", "partners", "has"),
    [
        ([7, 8, 9], False, [1, 2, 0], [True] * 3),
        ([7, 7, 9, 7], False, [2, 2, 3, 2], [True] * 4),
        ([7, 7], False, None, [False] * 2),
        ([7], False, None, [False]),
        ([7, 8, 8, 9], True, [1, 0, 3, 2], [True] * 4),
        ([7, 7, 8, 9], True, [2, 3, 3, 2], [True] * 4),  # the first sample is a fallback
    ],
)
def test_no_volume_is_compared_with_its_own_case(cases, is_paired, partners, has):
    found, has_partner = partners_of(torch.tensor(cases), is_paired)
    assert has_partner.tolist() == has
    if partners is not None:
        assert found.tolist() == partners
        assert all(cases[i] != cases[j] for i, j in enumerate(found.tolist()))


def test_volumes_without_a_partner_add_nothing_to_the_inter_term():
    method, batch = small_voco(voco_dropout=0.0), small_batch(3)
    nn.init.normal_(method.teacher.head.layer1[0].weight)
    whole = method(batch, NOW)[1]
    same = method(batch | {"case": torch.zeros_like(batch["case"])}, NOW)[1]
    assert whole["partner_share"] == 1 and whole["loss_inter"] > 0
    assert same["partner_share"] == 0 and same["loss_inter"] == 0 and same["loss_intra"] == whole["loss_intra"]


# Faults 8 and 11: statistics of the batch, half precision


def test_the_method_says_that_its_norms_see_the_batch_and_keeps_no_statistics():
    method = small_voco()
    norms = [part for part in method.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert VoCo.sees_batch and len(norms) == 4
    assert all(not list(norm.buffers()) and not list(norm.parameters()) for norm in norms)


def test_half_precision_neither_breaks_the_logarithm_nor_reaches_the_losses():
    rows = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().expand(1, 9, 1024)
    predicted = predicted_overlap(rows[:, :2], rows)
    assert predicted.dtype == torch.float32 and predicted.min() > 0.999 and predicted.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert predicted_overlap(rows[:, :2], rows).dtype == torch.float32
        total, terms = small_voco()(small_batch(), NOW)
    assert total.dtype == torch.float32 and all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize("options, flag", [
    ({"voco_dropout": 1.0}, "--voco_dropout"), ({"voco_dim": 0}, "--voco_dim"),
    ({"momentum_teacher": 1.5}, "--momentum_teacher"),
])  # fmt: skip
def test_impossible_values_name_the_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        VoCoOptions(**options)


def test_defaults_are_those_of_the_variant():
    assert [(VoCoOptions(v).dropout, VoCoOptions(v).dim) for v in ("v2", "v1", "paper")] == [
        (0.2, 1024), (0.0, 2048), (0.0, 2048)
    ]  # fmt: skip


# Weights of the published layouts


def published_state(variant: str, method: VoCo, prefix: str) -> dict[str, Tensor]:
    """A state dict as the repositories write it: v1 has two whole networks, v2 one backbone; "bare" is an encoder."""
    encoder = method.student.backbone.network.state_dict()
    head = method.student.head.state_dict()
    if variant == "bare":
        state = encoder
    elif variant == "v2":
        state = {f"backbone.{name}": value for name, value in encoder.items()}
        state |= {f"student.{name}": value for name, value in head.items()}
        state |= {f"teacher.{name}": value + 5 for name, value in head.items()}
    else:
        network = encoder | {f"proj_head.{name}": value for name, value in head.items()}
        state = {f"student.{name}": value for name, value in network.items()}
        state |= {f"teacher.{name}": value + 5 for name, value in network.items()}
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("variant", ["bare", "v2", "v1"])
def test_published_files_are_gone_on_from_with_their_heads(variant, prefix, tmp_path):
    roi = (64, 32, 32)
    source = small_voco("v2", "swin_unetr_v2", 12, roi)
    with torch.no_grad():
        for parameter in source.student.parameters():
            parameter.normal_()
    state = published_state(variant, source, prefix)
    torch.save(state if variant == "bare" else {"global_step": 7, "state_dict": state}, tmp_path / "voco.pt")
    method = small_voco("v1" if variant == "v1" else "v2", "swin_unetr_v2", 12, roi)
    report = start_from(method, tmp_path / "voco.pt")
    has_head = variant != "bare"
    for name, value in source.student.state_dict().items():
        assert torch.equal(method.student.state_dict()[name], value) is (has_head or not name.startswith("head.")), name
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, method.student.state_dict()[name])
    assert "145 of 145 keys" in report.describe() and report.missing == [] and report.misshapen == []
    assert ("6 beside it (head." in report.describe()) is has_head


def test_a_published_encoder_fills_a_segmenter_of_its_version_only(tmp_path):
    source = small_voco("v2", "swin_unetr_v2", 12, (64, 32, 32))
    torch.save({"state_dict": published_state("v2", source, "module.")}, tmp_path / "voco.pt")
    report = load_pretrained(SEGMENTERS["swin_unetr_v2"].build(1, 4, 12), tmp_path / "voco.pt")
    assert len(report.loaded) == 145 and not report.missing
    with pytest.raises(WeightsError, match="weights are of SwinUNETR-V2 .--backbone swin_unetr_v2., the network is"):
        load_pretrained(SEGMENTERS["swin_unetr"].build(1, 4, 12), tmp_path / "voco.pt")


# Whole runs


SETTINGS = {
    **{"method": "voco", "backbone": "unet", "feature_size": 6, "roi_z": 16, "roi_y": 16, "roi_x": 16, "voco_dim": 16},
    **{"batch_size": 2, "accumulate_steps": 2, "epochs": 2, "steps_per_epoch": 2, "warmup_epochs": 0.5, "log_freq": 1},
    **{"picture_freq": 2, "val_freq": 1, "num_val_pairs": 2, "num_workers": 0, "device": "cpu", "precision": "fp32"},
    **{"keep_freq": 1, "lr": 1e-3},
}


def command(corpus, output_dir, **changed) -> list[str]:
    paths = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store"}
    flags = SETTINGS | paths | {"output_dir": output_dir} | changed
    return [*(f"--{name}={value}" for name, value in flags.items()), "--grid_bases", "2", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))


def assert_same_states(one, other) -> None:
    ours, theirs = (torch.load(folder / LATEST, weights_only=True) for folder in (one, other))
    assert ours["step"] == theirs["step"] == 4
    for part in ("student", "teacher"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    for index, values in ours["optimizer"]["state"].items():
        assert all(torch.equal(value, theirs["optimizer"]["state"][index][name]) for name, value in values.items())


@pytest.mark.usefixtures("one_thread")
def test_a_run_learns_resumes_bit_by_bit_and_its_weights_fill_monais_network(corpus, tmp_path):
    main_ddp.main(command(corpus, tmp_path / "a"))
    lines = log_of(tmp_path / "a")
    names = {"loss_intra", "loss_inter", "loss_reg", "label_loss", "label_loss_at_zero", "label_loss_at_constant"}
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and names <= lines[-1].keys()
    assert [line["step"] for line in log_of(tmp_path / "a", "validation")] == [2, 4]
    assert (tmp_path / "a" / "features.png").is_file()
    main_ddp.main(command(corpus, tmp_path / "b", resume=tmp_path / "a" / "checkpoint0001.pth"))
    assert_same_states(tmp_path / "a", tmp_path / "b")
    words = [str(tmp_path / "a" / LATEST), str(tmp_path / "weights.pth"), "--checkpoint_key", "student", "--with_head"]
    extract_backbone_weights.main(words)
    weights = read_weights_file(tmp_path / "weights.pth").tensors
    assert any(name.startswith("head.layer1.") for name in weights)
    missing = segmentation_network("unet", 1, 3, 6).load_state_dict(weights, strict=False)[0]
    assert missing and all(name.startswith(("out.", "decoder.")) for name in missing)


def test_two_ranks_run_with_accumulation_and_resume_bit_by_bit(corpus, tmp_path):
    changed = {"picture_freq": 0, "pairing": "grid_sam", "embed_dir": corpus / "embeddings", "min_score": -1}
    assert two_ranks(command(corpus, tmp_path / "a", **changed), tmp_path / "a.txt") == [0, 0], (
        tmp_path / "a.txt"
    ).read_text()
    changed["resume"] = tmp_path / "a" / "checkpoint0001.pth"
    assert two_ranks(command(corpus, tmp_path / "b", **changed), tmp_path / "b.txt") == [0, 0]
    assert_same_states(tmp_path / "a", tmp_path / "b")
    assert log_of(tmp_path / "a")[-1]["partner_share"] == 1


def test_exported_encoder_matches_monais_version_2_in_all_entries(tmp_path):
    method = small_voco("v2", "swin_unetr_v2", 12, (64, 32, 32))
    exported = method.student.backbone.network.state_dict()
    reference = SwinUNETR(1, 3, feature_size=12, use_v2=True)
    missing, unexpected = reference.load_state_dict(exported, strict=False)
    assert len(exported) == 145 and unexpected == [] and all(name.startswith(("decoder", "out.")) for name in missing)


def test_help_shows_the_flags_of_the_method_and_the_rule():
    text = main_ddp.make_flags("voco").format_help()
    assert all(f"--{name}" in text for name in ("voco_variant", "voco_dropout", "grid_bases", "grid_crops"))
    assert "lambda1" not in text and METHODS["voco"] is VoCo
