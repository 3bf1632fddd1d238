from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForMaskedLM

from modular_star_encoder import modeling
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, modeling_modular_star_encoder
from tests.tiny import EXIT_LAYERS, run, tiny_batch, tiny_model

INPUTS = tiny_batch()
LABELS = torch.full_like(INPUTS["input_ids"], -100)
LABELS[0, 2], LABELS[0, 5], LABELS[1, 9], LABELS[2, 11] = 17, 40, 250, 5
ICC_LABELS = torch.tensor([1, 0, 1])
BATCH = INPUTS | {"labels": LABELS, "icc_labels": ICC_LABELS}


@pytest.fixture
def pretraining_model():
    return tiny_model(ModularStarEncoderForPreTraining).eval()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_losses_are_cross_entropies_of_each_exit_at_masked_positions_and_of_pairs(pretraining_model):
    output, masked = run(pretraining_model, **BATCH), LABELS != -100
    # Without masked tokens, the loss is 0.
    assert run(pretraining_model, **BATCH | {"labels": torch.full_like(LABELS, -100)}).mlm_losses.tolist() == [0.0] * 3
    for place, exit_layer in enumerate(EXIT_LAYERS):
        icc_logits = output.icc_logits[place]
        torch.testing.assert_close(output.icc_losses[place], nn.functional.cross_entropy(icc_logits, ICC_LABELS))
        torch.testing.assert_close(output.icc_accuracies[place], (icc_logits.argmax(-1) == ICC_LABELS).float().mean())
        logits = run(pretraining_model, **INPUTS, exit_layer=exit_layer).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
        torch.testing.assert_close(output.mlm_losses[place], expected)
        accuracy = (logits.argmax(-1) == LABELS)[masked].float().mean()
        torch.testing.assert_close(output.mlm_accuracies[place], accuracy)
    assert len(set(output.mlm_losses.tolist())) == 3
    losses = output.mlm_losses + output.icc_losses
    torch.testing.assert_close(output.loss, losses[0] * 1 / 4 + losses[1] * 2 / 4 + losses[2] * 4 / 4)


def test_gradients_of_the_mlm_losses_are_those_of_plain_cross_entropy(pretraining_model, monkeypatch):
    weights = torch.tensor([0.5, 2.0, 1.0])
    logits = [pretraining_model(**INPUTS, exit_layer=exit_layer).logits for exit_layer in EXIT_LAYERS]
    plain = [nn.functional.cross_entropy(exit.flatten(0, 1), LABELS.flatten()) for exit in logits]
    expected = gradients(pretraining_model, (torch.stack(plain) * weights).sum())
    for name, size in {"TOKENS_PER_CHUNK": 1, "LOGITS_PER_CHUNK": 1500}.items():
        monkeypatch.setattr(modeling_modular_star_encoder, name, size)
    losses = pretraining_model(**INPUTS, labels=LABELS).mlm_losses
    ours = gradients(pretraining_model, (losses * weights).sum())
    assert "heads.decoder.bias" in expected
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("output_name", ["mlm_losses", "icc_logits"])
def test_shared_heads_read_the_exit(pretraining_model, output_name):
    before = getattr(run(pretraining_model, **BATCH), output_name)
    with torch.no_grad():
        pretraining_model.heads.exit_embedding.weight[1] += 1.0
    after = getattr(run(pretraining_model, **BATCH), output_name)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True]


def test_every_parameter_is_trained_by_the_pretraining_loss(pretraining_model):
    pretraining_model(**BATCH).loss.backward()
    idle = [name for name, p in pretraining_model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias shared by all keys shifts a row of attention scores evenly, which softmax does not see.
    assert [name for name in idle if "k_proj.bias" not in name] == []


@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize(
    ("model_class", "targets"),
    [
        *((ModularStarEncoderForPreTraining, targets) for targets in (("labels",), ("icc_labels",), ("none masked",))),
        (modeling.ModularStarEncoderForMaskedLM, ("labels",)),
        (modeling.ModularStarEncoderForSequenceClassification, ("icc_labels",)),
    ],
)
def test_ddp_finds_no_unused_parameter_whatever_labels_are_missing(model_class, targets, token_weights):
    model = tiny_model(model_class, token_weights=token_weights)
    batch = {"labels": LABELS, "icc_labels": ICC_LABELS, "none masked": torch.full_like(LABELS, -100)}
    names = {"none masked": "labels"} | ({} if "ForPreTraining" in model_class.__name__ else {"icc_labels": "labels"})
    model(**INPUTS, **{names.get(name, name): batch[name] for name in targets}).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("wrapped", ["lora", "offloaded", "int8"])
def test_the_mlm_loss_is_that_of_the_logits_whatever_wraps_the_decoder(wrapped):
    model = tiny_model(ModularStarEncoderForPreTraining).eval()
    if wrapped == "lora":
        lora = LoraConfig(target_modules=["decoder"], r=2, init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    elif wrapped == "offloaded":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with nullcontext() if wrapped == "lora" else torch.no_grad():
        losses = model(**BATCH).mlm_losses
        logits = model(**INPUTS, exit_layer=2).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    # Activations of quantised linear layers are rounded by the range of the batch, here of masked tokens or of all.
    torch.testing.assert_close(losses[1], expected, rtol=0, atol=0.1 if wrapped == "int8" else 1e-5)
    if wrapped == "lora":
        losses.sum().backward()
        assert all(p.grad.any() for name, p in model.named_parameters() if "lora" in name)


def test_a_masked_lm_has_the_logits_and_loss_of_a_pre_training_checkpoint_at_every_exit(pretraining_model, tmp_path):
    pretraining_model.save_pretrained(tmp_path)
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    both = run(pretraining_model, **BATCH)
    for place, exit_layer in enumerate(EXIT_LAYERS):
        expected = run(pretraining_model, **INPUTS, exit_layer=exit_layer).logits
        output = run(model, **INPUTS, labels=LABELS, exit_layer=exit_layer)
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(output.loss, both.mlm_losses[place])
        cut = AutoModelForMaskedLM.from_pretrained(tmp_path, exit_layer=exit_layer)
        for alone in (cut, model.slice(exit_layer)):
            torch.testing.assert_close(run(alone, **INPUTS).logits, expected, rtol=0, atol=0)
    accumulated = run(model, **INPUTS, labels=LABELS, num_items_in_batch=8).loss
    torch.testing.assert_close(accumulated, output.loss * 4 / 8)
    with pytest.raises(ValueError, match="exit_layers"):
        model(**INPUTS, exit_layers=(1, 2))


def send_inputs(device):
    """Return a hook like accelerate's, which moves the arguments of a module's call to the module's device."""

    def move(one):
        if isinstance(one, dict | tuple | list):
            moved = map(move, one.values() if isinstance(one, dict) else one)
            return dict(zip(one, moved, strict=True)) if isinstance(one, dict) else type(one)(moved)
        return one.to(device) if hasattr(one, "to") else one

    return lambda _, args, kwargs: (move(args), move(kwargs))


@pytest.mark.parametrize("unpad_inputs", [False, True])
@pytest.mark.parametrize(
    ("model_class", "arguments"),
    [
        (modeling.ModularStarEncoderForRetrieval, {"exit_layers": EXIT_LAYERS}),
        (ModularStarEncoderForPreTraining, {"icc_labels": ICC_LABELS}),
        (ModularStarEncoderForPreTraining, {"labels": LABELS, "icc_labels": ICC_LABELS}),
        (modeling.ModularStarEncoderForMaskedLM, {"labels": LABELS, "exit_layer": 4}),
        (modeling.ModularStarEncoderForSequenceClassification, {"labels": ICC_LABELS, "exit_layers": EXIT_LAYERS}),
    ],
)
def test_layers_and_heads_may_be_on_other_devices(model_class, arguments, unpad_inputs):
    model = tiny_model(model_class, token_weights=True, unpad_inputs=unpad_inputs)
    first = [model.model.embed_tokens, model.model.token_weights, model.model.rotary_emb, *model.model.layers[:2]]
    # Exits 1 and 2 of the retrieval model have heads on the first device, too.
    first += [head for name, head in getattr(model, "projection_heads", {}).items() if name != "4"]
    stay = {id(part) for module in first for part in module.modules()}
    for module in model.modules():
        if module not in (model, model.model) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            device = "cpu" if id(module) in stay else "meta"
            module._apply(lambda tensor, device=device: tensor.to(device), recurse=False)
            module.register_forward_pre_hook(send_inputs(device), with_kwargs=True)
    output = run(model, **INPUTS, **arguments)
    assert {one.device.type for one in (output[0], output[1])} == {"meta"}


@pytest.mark.parametrize(
    ("num_labels", "labels"), [(1, torch.tensor([0.1, 0.2, 0.3])), (3, torch.tensor([0, 2, 1])), (3, torch.eye(3))]
)
def test_classification_trains_any_exit(num_labels, labels):
    model = tiny_model(modeling.ModularStarEncoderForSequenceClassification, num_labels=num_labels)
    output = run(model, **INPUTS, labels=labels, exit_layers=(1, 4))
    assert output.logits.shape == (3, num_labels)
    assert output.exit_logits.shape == (2, 3, num_labels)
    alone = [run(model, **INPUTS, labels=labels, exit_layer=exit_layer).loss for exit_layer in (1, 4)]
    torch.testing.assert_close(output.loss, sum(alone))
