"""Tiny, randomly initialised models, and LoRA layers seen through PEFT's own names.

Nothing here imports scalora: the tests that reload what it wrote run where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 23

# What a script begins with that runs where scalora is not installed.
WITHOUT_SCALORA = f"""
import sys
sys.modules["scalora"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
try:
    import scalora
except ImportError:
    pass
else:
    raise SystemExit("scalora can be imported here")
"""


class Perceptron(nn.Module):
    """Two linear layers."""

    def __init__(self, inputs: int = 12, hidden: int = 20, outputs: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Embedder(nn.Module):
    """An embedding under a linear layer."""

    def __init__(self, **embedding: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 10, **embedding)
        self.head = nn.Linear(10, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids)))


class Convolutions(nn.Module):
    """One convolution under a linear layer."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.head = nn.Linear(convolution.out_channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.convolution(x)).flatten(2).mean(-1))


class Attention(nn.Module):
    """A ``nn.MultiheadAttention`` under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


def bert_config(**changes: Any) -> BertConfig:
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertConfig(**{**options, **changes})


def bert(**changes: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(bert_config(**changes))


def bert_without_head(**changes: Any) -> BertModel:
    return BertModel(bert_config(**changes))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    options = dict(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(GPT2Config(**{**options, **changes}))


def llama(**changes: Any) -> LlamaForCausalLM:
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def with_lora(base: nn.Module, *, autocast_adapter_dtype: bool = True, **config: Any) -> Any:
    options = dict(r=3, lora_alpha=6)
    return get_peft_model(
        base, LoraConfig(**{**options, **config}), autocast_adapter_dtype=autocast_adapter_dtype
    )


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def token_ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


class Sequences(torch.utils.data.Dataset):
    """16 random sequences of 9 tokens for a language model, as a Trainer takes them."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(1, VOCABULARY, (9,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """A plain module's output, or a transformers model's logits or hidden states."""
    result = model(inputs)
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    """Squared distance from targets that no low-rank change reaches."""
    found = outputs(model, inputs)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    return (found - targets.to(found.dtype)).square().mean()


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """A language model's own loss on its inputs."""
    return model(input_ids=ids, labels=ids).loss


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    steps: int,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss,
) -> list[float]:
    """The losses of ``steps`` steps on the same inputs."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, inputs)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def train_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    loss: Callable[[nn.Module, Tensor], Tensor] = loss,
) -> list[float]:
    """The losses of one step on each batch."""
    return [train(model, optimizer, batch, 1, loss)[0] for batch in batches]


def train_by(
    backward: Callable[[nn.Module, int], Tensor | float],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Iterable[int],
) -> list[float]:
    """The losses of one step per number; ``backward`` makes its gradients and returns its loss."""
    losses = []
    for number in numbers:
        optimizer.zero_grad()
        losses.append(float(backward(model, number)))
        optimizer.step()
    return losses


@torch.no_grad()
def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs in evaluation mode; the model's mode stays as it was."""
    was_training = model.training
    model.eval()
    found = outputs(model, inputs).clone()
    model.train(was_training)
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layer(model: nn.Module, name: str) -> Any:
    """PEFT's layer by its name in the model that the adapter was put on."""
    return model.get_base_model().get_submodule(name)


def factor_parameters(lora: Any, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """``lora_B`` and ``lora_A`` of a layer."""
    if adapter in lora.lora_embedding_A:
        return lora.lora_embedding_B[adapter], lora.lora_embedding_A[adapter]
    return lora.lora_B[adapter].weight, lora.lora_A[adapter].weight


def factors(lora: Any, adapter: str = "default") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P (m, r), Q (n, r) and their gradients, as the derivation writes them; copies."""
    B, A = factor_parameters(lora, adapter)
    P, Q = B.detach().flatten(1), A.detach().flatten(1).T
    return P.clone(), Q.clone(), B.grad.flatten(1).clone(), A.grad.flatten(1).T.clone()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained and what is frozen, without the buffers."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything the model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names, and the same numbers under each."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert_same(before, bits(model))
