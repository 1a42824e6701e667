"""What is computed in bfloat16 and what never is."""

from dataclasses import replace

import pytest
import torch

from ldm.training import processes
from ldm.training.stage_one import AutoencoderStage
from ldm.training.state import load_state

from .toys import AUTOENCODER, CPU, LOOP, run


@pytest.mark.parametrize(
    ("gpu", "bf16", "chosen"), [(True, True, "bf16"), (True, False, "fp32"), (False, True, "fp32")]
)
def test_bf16_is_the_default_on_a_gpu_that_computes_in_it_and_nowhere_else(monkeypatch, gpu, bf16, chosen):
    """On a CPU never: it says that it can, and most then take hundreds of times as long."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: bf16)
    assert processes.precision_here("auto") == chosen


def test_in_bf16_weights_losses_and_posteriors_stay_float32(tmp_path):
    seen: dict[str, set[torch.dtype]] = {"conv": set(), "loss": set(), "moments": set()}

    class Seen(AutoencoderStage):
        def losses(self, batch, draws, step, networks):
            hook = self.autoencoder.decoder.last_layer.register_forward_hook(lambda *a: seen["conv"].add(a[2].dtype))
            for name, loss, logs in super().losses(batch, draws, step, networks):
                seen["loss"].add(loss.dtype)
                yield name, loss, logs
            hook.remove()

    loop = replace(LOOP, steps=3, precision="bf16", global_batch=4)
    config = replace(AUTOENCODER, loop=loop, scale_samples=4)
    stage = Seen(config, 0, 1, CPU)
    encode = stage.autoencoder.encode

    def encoded(image):
        posterior = encode(image)
        seen["moments"].add(posterior.mean.dtype)
        return posterior

    stage.autoencoder.encode = encoded
    run(stage, loop, tmp_path, config)
    assert seen["conv"] == {torch.bfloat16}  # it was indeed on
    assert seen["loss"] == seen["moments"] == {torch.float32}
    found = load_state(tmp_path)
    assert found is not None
    for group in (found[1]["modules"]["autoencoder"], found[1]["averages"]["autoencoder"]["average"]):
        assert {tensor.dtype for tensor in group.values()} == {torch.float32}
