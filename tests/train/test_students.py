"""Students from presets, configs and checkpoints, and the teacher folded into them."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.utils import logging  # noqa: E402

from fastdistill.train import students  # noqa: E402
from fastdistill.train.students import (  # noqa: E402
    build_student,
    count_parameters,
    init_from_teacher,
    measure_seconds,
)

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
LABELS = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def spec(tmp_path, **values):
    path = tmp_path / "student.json"
    path.write_text(json.dumps(values))
    return path


def tokens(rows=32, length=24, vocabulary=100, seed=0):
    return torch.randint(5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def distance(student, teacher, projection, places, batch):
    """||projected student states - teacher states|| / ||teacher states||, over the mapped hidden states."""
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True).hidden_states
        theirs = teacher(**batch, output_hidden_states=True).hidden_states
    pairs = [(x @ projection.T, theirs[place]) for x, place in zip(ours, places, strict=False)]
    wrong = sum((a - b).square().sum() for a, b in pairs)
    return float((wrong / sum(b.square().sum() for _, b in pairs)).sqrt())


@pytest.fixture
def propagated():
    """Lets caplog see the messages of transformers, without its progress bars."""
    logging.enable_propagation()
    logging.disable_progress_bar()
    yield
    logging.disable_propagation()
    logging.enable_progress_bar()


class TestSpecs:
    def test_presets_have_the_published_sizes(self):
        teacher = BertModel(BertConfig(num_hidden_layers=1))
        four = build_student("tinybert-4l-312", teacher, init="random")
        assert count_parameters(four) == {"total": 14_350_248, "encoder": 4 * 1_142_184}
        assert four.config.num_attention_heads == 12
        six = build_student("tinybert-6l-768", teacher, init="random")
        assert count_parameters(six) == {"total": 66_955_008, "encoder": 6 * 7_087_872}
        # Table 1 of arXiv 1909.10351 in millions. Its 14.5 lies between 14.35 and 14.59, with the projection to 768.
        with torch.device("meta"):
            base = count_parameters(BertModel(BertConfig()))["total"]
        found = [count_parameters(four)["total"], count_parameters(six)["total"], base]
        assert [n / 1e6 for n in found] == pytest.approx([14.5, 67, 109], rel=0.011)
        assert four.config.hidden_size * 768 + 768 + found[0] == 14_590_632
        assert base / found[0] == pytest.approx(7.5, rel=0.02)  # "7.5x smaller"

    def test_partial_config_takes_the_rest_from_the_teacher(self, tmp_path):
        teacher = BertForSequenceClassification(BertConfig(**SMALL, **LABELS, hidden_dropout_prob=0.25))
        student = build_student(spec(tmp_path, hidden_size=26, num_hidden_layers=2), teacher, init="random")
        assert type(student) is BertForSequenceClassification
        assert student.config.id2label == LABELS["id2label"]
        assert student.config.label2id == LABELS["label2id"]
        assert student.config.hidden_dropout_prob == 0.25
        assert student.bert.encoder.layer[1].attention.self.attention_head_size == 13
        assert not student.training
        assert teacher.config.hidden_size == 32

    @pytest.mark.parametrize("family", ["qwen2", "modernbert", "mistral", "llama", "gemma3_text"])
    @pytest.mark.parametrize("layers", [2, 6])
    def test_layer_types_follow_the_depth(self, tmp_path, family, layers):
        """Layer types and head_dim equal those of the family's own config at the student's size."""
        kind = type(AutoConfig.for_model(family))
        options = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "num_hidden_layers": 4}
        teacher = AutoModel.from_config(kind(**options))
        changes = {"num_hidden_layers": layers, "hidden_size": 16}
        student = build_student(spec(tmp_path, **changes), teacher, init="random")
        student.save_pretrained(tmp_path / "out")
        again = AutoModel.from_pretrained(tmp_path / "out").config
        expected = kind(**{**options, **changes})
        assert getattr(again, "layer_types", None) == getattr(expected, "layer_types", None)
        assert getattr(again, "head_dim", None) == getattr(expected, "head_dim", None)
        student(input_ids=tokens(2, 8))

    @pytest.mark.skipif(not hasattr(BertConfig, "validate"), reason="this transformers checks no config by itself")
    def test_a_config_that_is_none_is_refused(self, tmp_path):
        teacher = AutoModel.from_config(type(AutoConfig.for_model("qwen2"))(**SMALL, num_key_value_heads=2))
        with pytest.raises(ValueError, match=r"(?s)student\.json: .*layer_types"):
            build_student(spec(tmp_path, num_hidden_layers=2, layer_types=["full_attention"]), teacher, init="random")

    def test_a_checkpoint_without_its_encoder_is_refused(self, tmp_path):
        saved = BertModel(BertConfig(**SMALL))
        weights = {f"student.{name}": x for name, x in saved.state_dict().items()}
        saved.save_pretrained(tmp_path, state_dict=weights)
        for teacher in (BertModel(BertConfig(**SMALL)), BertForSequenceClassification(BertConfig(**SMALL))):
            with pytest.raises(ValueError, match=r"its weights are no .*there is no .*embeddings"):
                build_student(tmp_path, teacher)

    def test_a_teacher_in_half_precision_gets_a_float32_student(self, tmp_path):
        teacher = BertModel(BertConfig(**SMALL)).bfloat16()
        student = build_student(spec(tmp_path, num_hidden_layers=2, hidden_size=16), teacher)
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        assert student.config.dtype == torch.float32

    def test_whole_config_may_be_another_family(self, tmp_path):
        teacher = BertForSequenceClassification(BertConfig(**SMALL, **LABELS))
        config = DistilBertConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        config.save_pretrained(tmp_path)
        student = build_student(tmp_path / "config.json", teacher, init="random")
        assert isinstance(student, DistilBertForSequenceClassification)
        assert student.config.id2label == LABELS["id2label"]

    def test_checkpoint_keeps_its_weights_and_gets_the_labels(self, tmp_path):
        saved = BertModel(BertConfig(**{**SMALL, "hidden_size": 16, "num_hidden_layers": 2}))
        saved.save_pretrained(tmp_path)
        teacher = BertForSequenceClassification(BertConfig(**SMALL, **LABELS))
        student = build_student(tmp_path, teacher)
        weight = "encoder.layer.1.output.dense.weight"
        assert torch.equal(student.bert.get_parameter(weight), saved.get_parameter(weight))
        assert student.config.id2label == LABELS["id2label"]
        assert student.classifier.out_features == 3

    def test_a_new_head_is_quiet_and_lost_weights_are_not(self, tmp_path, propagated, capsys, caplog):
        BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "masked")
        BertForSequenceClassification(BertConfig(**SMALL, num_labels=2)).save_pretrained(tmp_path / "classes")
        teacher = BertForSequenceClassification(BertConfig(**SMALL, **LABELS))
        for name in ("masked", "classes"):  # a head of another kind, and one for other labels
            build_student(tmp_path / name, teacher)
        assert not caplog.text
        assert not any(capsys.readouterr())
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked")
        assert "newly initialized" in caplog.text  # transformers reports it by itself

        caplog.clear()
        (tmp_path / "classes" / "config.json").write_text(
            json.dumps({**BertConfig(**{**SMALL, "num_hidden_layers": 3}).to_dict(), "model_type": "bert"})
        )
        build_student(tmp_path / "classes", teacher)
        assert "does not use: bert.encoder.layer.3.attention" in caplog.text
        (tmp_path / "masked" / "config.json").write_text(
            json.dumps(BertConfig(**{**SMALL, "num_hidden_layers": 5}).to_dict())
        )
        with pytest.raises(ValueError, match=r"there is no .*encoder\.layer\.4\.attention.* and 13 more"):
            build_student(tmp_path / "masked", teacher)

    def test_an_exported_student_loads_with_auto_classes(self, tmp_path):
        teacher = BertForSequenceClassification(BertConfig(**SMALL, **LABELS))
        student = build_student(spec(tmp_path, hidden_size=16, num_hidden_layers=2), teacher)
        student.save_pretrained(tmp_path / "out")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        ids = tokens(2, 5)
        assert torch.equal(again(input_ids=ids).logits, student(input_ids=ids).logits)

    def test_bad_specs(self, tmp_path):
        teacher = BertModel(BertConfig(**SMALL))
        with pytest.raises(ValueError, match="'hiden_size' is no setting of a bert config"):
            build_student(spec(tmp_path, hiden_size=16), teacher, init="random")
        with pytest.raises(ValueError, match="vocabulary has 99 tokens, the teacher's 100"):
            build_student(spec(tmp_path, vocab_size=99), teacher, init="random")
        with pytest.raises(ValueError, match="init is 'svd'; it should be 'random' or 'teacher'"):
            build_student(spec(tmp_path), teacher, init="svd")
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            build_student(tmp_path, teacher)
        (tmp_path / "broken.json").write_text("{")
        with pytest.raises(ValueError, match=r"broken\.json: not JSON"):
            build_student(tmp_path / "broken.json", teacher)
        BertModel(BertConfig(**{**SMALL, "vocab_size": 99})).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="vocabulary has 99 tokens"):
            build_student(tmp_path / "other", teacher)
        with pytest.raises(ValueError, match=r"a checkpoint .* brings its own weights"):
            build_student(tmp_path / "other", teacher, init="teacher")


def widened(narrow):
    """Returns a BERT twice as wide that computes what `narrow` does, with each hidden dimension doubled."""
    config = BertConfig(**{**narrow.config.to_dict(), "hidden_size": 32, "intermediate_size": 64})
    wide = BertModel(config, add_pooling_layer=False).eval()

    def columns(weight):  # for doubled inputs
        return torch.cat([weight, weight], dim=1) / 2

    heads, d = 2, 8
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            theirs = narrow.get_parameter(name)
            if "LayerNorm" in name or "embeddings" in name or name.endswith("output.dense.bias"):
                parameter.copy_(torch.cat([theirs, theirs], dim=-1))
            elif ".self." in name:  # each head padded with zeros to twice its dimension
                rows = theirs if theirs.dim() == 1 else columns(theirs)
                rows = rows.unflatten(0, (heads, d))
                # Scores are divided by sqrt(2 d) instead of sqrt(d).
                rows = rows if "value" in name else rows * 2**0.25
                parameter.copy_(torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1))
            elif "intermediate" in name:  # adds neurons that never fire
                rows = theirs if theirs.dim() == 1 else columns(theirs)
                parameter.copy_(torch.cat([torch.zeros_like(rows), rows]))
            elif "attention.output.dense" in name:
                inputs = theirs.unflatten(1, (heads, d))
                inputs = torch.cat([inputs, torch.zeros_like(inputs)], dim=2).flatten(1)
                parameter.copy_(torch.cat([inputs, inputs]))
            else:  # output.dense
                inputs = torch.cat([torch.zeros_like(theirs), theirs], dim=1)
                parameter.copy_(torch.cat([inputs, inputs]))
    return wide


class TestFold:
    def narrow(self, seed=0, **changes):
        torch.manual_seed(seed)
        config = BertConfig(**{**SMALL, "hidden_size": 16, "intermediate_size": 32, **changes})
        model = BertModel(config, add_pooling_layer=False).eval()
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:  # far from linear, unlike at the usual 0.02
                parameter.data.normal_(std=0.5 if "embeddings" in name else 0.3)
        return model

    def test_a_teacher_that_fits_is_recovered(self, monkeypatch):
        # The states of the widened teacher have a rank that the narrow student can represent.
        narrow = self.narrow()
        teacher, batch = widened(narrow), {"input_ids": tokens(8, 12, seed=1)}
        assert distance(narrow, teacher, torch.eye(16).repeat(2, 1), range(5), batch) < 1e-5
        monkeypatch.setattr(students, "RIDGE", 1e-9)
        student = self.narrow(seed=1)
        projection = init_from_teacher(student, teacher, calibration={"input_ids": tokens(64, 24)})
        # The embeddings and the first layer's scores are linear in the student's input, so the fit is exact.
        assert distance(student, teacher, projection, [0], batch) < 1e-3
        ours, theirs = (self.scores(model, batch["input_ids"]) for model in (student, teacher))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
        # LayerNorm is not linear, so the fit is only near.
        assert distance(student, teacher, projection, range(5), batch) < 0.25

    def scores(self, model, ids):
        layer = model.encoder.layer[0].attention.self
        with torch.no_grad():
            x = model.embeddings(ids)
            query, key = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (layer.query, layer.key))
        return query @ key.mT / query.shape[-1] ** 0.5

    def test_padding_changes_nothing(self):
        teacher = self.narrow()
        ids = tokens(40, 20)
        padded = torch.cat([ids, torch.zeros(40, 6, dtype=torch.long)], dim=1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(40, 6, dtype=torch.long)], dim=1)
        config = {**SMALL, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16}
        folded = []
        for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
            student = BertModel(BertConfig(**config))
            init_from_teacher(student, teacher, calibration=batch)
            folded.append(student)
        one, other = (torch.cat([p.detach().flatten() for p in s.encoder.parameters()]) for s in folded)
        assert float((one - other).norm() / one.norm()) < 1e-3

    def test_the_right_teacher_layer_is_folded(self):
        teacher = self.narrow(hidden_size=32, intermediate_size=64)
        batch = {"input_ids": tokens(8, 12, seed=1)}
        calibration = {"input_ids": tokens(64, 24)}
        config = {**SMALL, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
        for layer_map, places in {"uniform": (0, 2, 4), "bottom": (0, 1, 2)}.items():
            student = BertModel(BertConfig(**config), add_pooling_layer=False).eval()
            projection = init_from_teacher(student, teacher, layer_map=layer_map, calibration=calibration)
            near = distance(student, teacher, projection, places, batch)
            far = distance(student, teacher, projection, (0, *(place - 1 for place in places[1:])), batch)
            assert near < 0.75 * far

    @pytest.mark.parametrize(
        ("family", "config"),
        [
            (RobertaModel, RobertaConfig(**SMALL, pad_token_id=1)),
            (ElectraModel, ElectraConfig(**SMALL, embedding_size=20)),
            (ElectraModel, ElectraConfig(**SMALL, embedding_size=32)),
            (ElectraModel, ElectraConfig(**SMALL, embedding_size=16)),
        ],
        ids=["roberta", "electra", "electra-base", "electra-small"],
    )
    def test_families(self, family, config, tmp_path):
        torch.manual_seed(0)
        teacher = family(config).eval()
        batch = {"input_ids": tokens(seed=1), "attention_mask": torch.ones(32, 24, dtype=torch.long)}
        path = spec(tmp_path, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
        random = build_student(path, teacher, init="random")
        folded = build_student(path, teacher, init="random")
        projection = init_from_teacher(folded, teacher, calibration={"input_ids": tokens(64)})
        near = distance(folded, teacher, projection, (0, 2, 4), batch)
        assert near < 0.75 * distance(random, teacher, projection, (0, 2, 4), batch)

    def test_equal_widths_copy_layers_and_heads(self, tmp_path):
        teacher = BertForSequenceClassification(BertConfig(**SMALL, **LABELS))
        student = build_student(spec(tmp_path, num_hidden_layers=2), teacher, layer_map=(0, 1, 4))
        theirs = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            name = name.replace("layer.1.", "layer.3.")
            assert torch.equal(parameter, theirs[name]), name

    @pytest.mark.parametrize("width", [32, 16])
    @pytest.mark.parametrize("family", [BertModel, RobertaModel, ElectraModel])
    def test_fewer_positions_and_types_are_the_first(self, tmp_path, family, width):
        teacher = family(family.config_class(**SMALL)).eval()
        whole = build_student(spec(tmp_path, hidden_size=width, num_hidden_layers=2), teacher, init="random")
        path = spec(tmp_path, hidden_size=width, num_hidden_layers=2, max_position_embeddings=20, type_vocab_size=1)
        short = build_student(path, teacher, init="random")
        calibration = {"input_ids": tokens(16, 18)}
        for student in (whole, short):
            init_from_teacher(student, teacher, calibration=calibration)
        tables = dict(whole.embeddings.named_parameters())
        for name, table in short.embeddings.named_parameters():
            assert torch.equal(table, tables[name][: len(table)]), name
        init_from_teacher(
            short, teacher, calibration={"input_ids": tokens(16, 38)}
        )  # is cut to the student's positions

    def test_unmapped_layers_start_between_their_neighbours(self):
        assert students.fill_gaps((0, None, None, 6)) == [0, 2, 4, 6]
        assert students.fill_gaps((None, 3)) == [3, 3]
        with pytest.raises(ValueError, match="maps no layer"):
            students.fill_gaps((None, None))

    def test_the_teacher_is_left_as_it_was(self):
        teacher = BertModel(BertConfig(**SMALL)).train()
        teacher(input_ids=tokens(), output_hidden_states=True)  # leaves hooks of transformers itself
        hooks = [len(module._forward_hooks) for module in teacher.modules()]
        before = {name: p.clone() for name, p in teacher.state_dict().items()}
        student = BertModel(BertConfig(**{**SMALL, "hidden_size": 16, "num_hidden_layers": 2}))
        init_from_teacher(student, teacher)
        assert teacher.training
        assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())
        assert hooks == [len(module._forward_hooks) for module in teacher.modules()]
        assert all(torch.isfinite(p).all() for p in student.parameters())

    def test_refusals(self):
        teacher = BertModel(BertConfig(**SMALL))

        def fold(**changes):
            return init_from_teacher(BertModel(BertConfig(**{**SMALL, **changes})), teacher)

        with pytest.raises(ValueError, match=r"num_attention_heads is 4; .* should be the teacher's 2"):
            fold(num_attention_heads=4)
        with pytest.raises(ValueError, match=r"hidden_size is 64; .* should be at most the teacher's 32"):
            fold(hidden_size=64)
        with pytest.raises(ValueError, match="intermediate_size is 128"):
            fold(intermediate_size=128)
        with pytest.raises(ValueError, match="3 does not divide 4"):
            fold(num_hidden_layers=3)
        with pytest.raises(ValueError, match="max_position_embeddings is 80"):
            fold(max_position_embeddings=80)
        with pytest.raises(ValueError, match="type_vocab_size is 3"):
            fold(type_vocab_size=3)
        with pytest.raises(ValueError, match="the student's model_type is 'roberta', the teacher's 'bert'"):
            init_from_teacher(RobertaModel(RobertaConfig(**SMALL)), teacher)
        electra = ElectraModel(ElectraConfig(**SMALL, embedding_size=16))
        with pytest.raises(ValueError, match=r"embedding_size is 8; .* should be the teacher's 16"):
            init_from_teacher(ElectraModel(ElectraConfig(**SMALL, embedding_size=8)), electra)
        distil = DistilBertModel(DistilBertConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32))
        with pytest.raises(ValueError, match="the student is a DistilBertModel, whose layers are not BERT's"):
            init_from_teacher(distil, teacher)


class TestSpeed:
    def test_models_take_turns_and_keep_their_mode(self):
        big = BertModel(BertConfig(**{**SMALL, "hidden_size": 256, "intermediate_size": 1024})).train()
        small = BertModel(BertConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
        seconds = measure_seconds({"big": big, "small": small}, {"input_ids": tokens()}, runs=5)
        assert seconds["big"] > 2 * seconds["small"]
        assert big.training
        assert not small.training

    def test_no_runs(self):
        with pytest.raises(ValueError, match="runs is 0"):
            measure_seconds({}, {}, runs=0)

    def test_tables_of_decoders_are_no_encoder(self):
        model = transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100))
        assert count_parameters(model)["encoder"] == sum(
            p.numel() for p in (*model.h.parameters(), *model.ln_f.parameters())
        )

    def test_tied_parameters_count_once(self):
        model = transformers.BertForMaskedLM(BertConfig(**SMALL))
        decoder = model.cls.predictions.decoder.weight
        assert decoder is model.bert.embeddings.word_embeddings.weight
        head = 32 * 32 + 32 + 2 * 32 + 100
        assert count_parameters(model)["total"] == count_parameters(model.bert)["total"] + head
