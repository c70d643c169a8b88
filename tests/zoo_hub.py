"""Small models of Hugging Face's architectures, from configs, and of TransformerLens."""

import torch
from law_models import BRIDGE, Case
from zoo_layers import generator, tokens

V = 11


def words():
    return {"input_ids": tokens(6, V)(), "attention_mask": torch.ones(32, 6, dtype=torch.long)}


def padded_words():
    batch = words()
    batch["attention_mask"][::2, -2:] = 0
    return batch


def language(model, batch):
    labels = batch["input_ids"].masked_fill(batch.get("attention_mask", batch["input_ids"]) == 0, -100)
    return model(**batch, labels=labels).loss


def translation(model, batch):
    return model(**batch, labels=batch["input_ids"][:, :4].contiguous()).loss


def causal(name: str, **config):
    def make():
        import transformers

        kind = getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(kind(vocab_size=V, **COMMON, **config))

    return make


def gpt2():
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def bert():
    import transformers

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=V, max_position_embeddings=8, **small))


def t5():
    import transformers

    config = transformers.T5Config(
        vocab_size=V, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mamba():
    import transformers

    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=V, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=2)
    )


SIDES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def vit():
    import transformers

    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SIDES)
    return transformers.ViTForImageClassification(config)


def whisper():
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        transformers.WhisperConfig(
            num_mel_bins=4, d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
            max_source_positions=6,
        )
    )  # fmt: skip


def clip():
    import transformers

    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**SIDES, "vocab_size": V, "max_position_embeddings": 8, "projection_dim": 6},
            vision_config={**SIDES, "image_size": 8, "patch_size": 4, "num_channels": 1, "projection_dim": 6},
            projection_dim=6,
        )
    )


def images():
    return torch.randn(32, 1, 8, 8, generator=generator(1))


def pixels(model, x):
    return (model(pixel_values=x).logits - 0.5).square().mean()


def sounds(model, x):
    return (model(x).last_hidden_state - 0.5).square().mean()


def contrast(model, batch):
    return model(**batch, return_loss=True).loss


COMMON = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 1}
HUB = {
    "GPT-2": Case(gpt2, language, words),
    "GPT-2, padded": Case(gpt2, language, padded_words),
    "GPT-NeoX": Case(causal("GPTNeoX"), language, words),
    "Llama": Case(causal("Llama", **GROUPED), language, padded_words),
    "Qwen 3": Case(causal("Qwen3", head_dim=4, **GROUPED), language, words),
    "Gemma": Case(causal("Gemma", head_dim=4, **GROUPED), language, words),
    "Mixtral": Case(causal("Mixtral", num_local_experts=3, num_experts_per_tok=2, **GROUPED), language, words),
    "Mamba": Case(mamba, language, lambda: {"input_ids": tokens(6, V)()}),
    "BERT": Case(bert, language, padded_words),
    "T5": Case(t5, translation, words),
    "ViT": Case(vit, pixels, images),
    "Whisper encoder": Case(whisper, sounds, lambda: torch.randn(32, 4, 12, generator=generator(1))),
    "CLIP": Case(clip, contrast, lambda: {**words(), "pixel_values": images()}),
    "TransformerLens bridge": BRIDGE,
}
