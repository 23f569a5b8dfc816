"""Run by the parity tests in a fresh interpreter: loads exports as a stranger would and writes down what it sees.

`python -I fresh_process.py REPORT FOLDER...`, with another working directory. Longspan cannot be imported here.
"""

import io
import json
import sys


class NoLongspan:
    """First on the import path: an export must do without the package that made it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "longspan":
            raise ImportError(f"{name} must not be needed")


sys.meta_path.insert(0, NoLongspan())

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def in_parts(model, tokens, sizes):
    """Logits of `tokens` given in parts; the largest difference to `whole` is what counts."""
    cache, logits, begin = None, [], 0
    for size in sizes:
        output = model(tokens[:, begin : begin + size], past_key_values=cache)
        cache, begin = output.past_key_values, begin + size
        logits.append(output.logits)
    assert begin == tokens.shape[1] and cache.get_seq_length() == begin
    return torch.cat(logits, 1)


def split_sizes(total, window, generator):
    """Token by token, cuts at block edges and one beside, and random cuts."""
    cuts = {"ones": [1] * total}
    for first in (window - 1, window, window + 1, 2 * window + 1):
        cuts[f"first {first}"] = [first, 1, 1, total - first - 2]
    for number in range(2):
        places = sorted(torch.randperm(total - 1, generator=generator)[:6].add(1).tolist())
        cuts[f"random {number}"] = [b - a for a, b in zip([0, *places], [*places, total], strict=True)]
    return cuts


def padded(rows, pad):
    """Rows of any length behind padding, and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def generation(model, tokens):
    """Tokens of several ways to decode that must agree."""
    row = tokens[:1, :21]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(row, **options)
    beams = {"num_beams": 3, **options}
    torch.manual_seed(0)
    drawn = model.generate(row, do_sample=True, max_new_tokens=12, eos_token_id=None)
    rows = [tokens[0, :21].tolist(), tokens[1, :10].tolist(), tokens[0, 3:8].tolist()]
    ids, mask = padded(rows, model.config.pad_token_id)
    batch = model.generate(ids, attention_mask=mask, **options)
    alone = [model.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]
    return {
        "greedy": greedy[0].tolist(),
        "greedy_without_cache": model.generate(row, use_cache=False, **options)[0].tolist(),
        "greedy_prefill_in_parts": model.generate(row, prefill_chunk_size=5, **options)[0].tolist(),
        "beams": model.generate(row, **beams)[0].tolist(),
        "beams_without_cache": model.generate(row, use_cache=False, **beams)[0].tolist(),
        "drawn": drawn[0].tolist(),
        "batch": batch[:, ids.shape[1] :].tolist(),
        "alone": alone,
    }


def right_padded(model, tokens):
    """Greedy tokens of rows with padding behind and inside them, and those of the rows alone."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    rows = [tokens[0, :21].tolist(), tokens[1, :10].tolist(), tokens[0, 3:8].tolist()]
    ids, mask = (part.flip(1) for part in padded([row[::-1] for row in rows], model.config.pad_token_id))
    mask[0, 12] = 0
    rows[0].pop(12)
    batch = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    return batch, [model.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]


def going_on(model, tokens):
    """Greedy tokens after a cache that read part of a padded batch, went through `torch.save`, and without one."""
    ids, mask = padded([tokens[0, :21].tolist(), tokens[1, :10].tolist()], model.config.pad_token_id)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = model(ids[:, :17], attention_mask=mask[:, :17]).past_key_values
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    caches = (None, cache, again)
    return [model.generate(ids, past_key_values=cache, **options).tolist() for cache in caches]


def in_bf16(folder, tokens):
    """Types of what a model in bf16 carries, and the relative difference of its logits to those in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    output = model(tokens)
    types = {str(t.dtype) for layer in output.past_key_values.layers for n, t in layer.tensors.items() if n == "state"}
    wanted = load(folder)(tokens).logits
    model.generate(tokens[:1, :9], max_new_tokens=9, eos_token_id=None)
    auto = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    return {
        "states": sorted(types),
        "difference": ((output.logits - wanted).abs().max() / wanted.abs().max()).item(),
        "auto": str(auto.dtype),
    }


def padding_differences(model, tokens, whole):
    """Largest differences of logits at real tokens, with padding left, inside and right, whole and token by token."""
    total, pad = tokens.shape[1], model.config.pad_token_id
    mask = torch.ones(2, total + 9, dtype=torch.int64)
    mask[0, :9] = 0
    mask[1, [0, 1, 2, 12, 13, 14, 15, -1, -2]] = 0
    ids = torch.full(mask.shape, pad)
    ids[mask.bool()] = tokens.flatten()

    def difference(logits):
        return max((logits[row][mask[row].bool()] - whole[row]).abs().max().item() for row in range(2))

    cache, steps = None, []
    for column in range(ids.shape[1]):
        output = model(ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.logits)
    return {"whole": difference(model(ids, attention_mask=mask).logits), "steps": difference(torch.cat(steps, 1))}


def cache_facts(model, tokens, whole):
    """reset, reordered rows, columns kept, the loss."""
    cache = model(tokens[:, :13]).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(tokens.flip(0)[:, 13:], past_key_values=cache).logits.flip(0)
    cache.reset()
    again = model(tokens, past_key_values=cache).logits
    labels = tokens.clone()
    labels[:, 3] = -100
    output = model(tokens, labels=labels)
    scored = whole[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    expected = -torch.cat([scored[:, :2], scored[:, 3:]], 1).mean()
    return {
        "reorder": (swapped - whole[:, 13:]).abs().max().item(),
        "reset": (again - whole).abs().max().item(),
        "kept": (model(tokens, logits_to_keep=2).logits - whole[:, -2:]).abs().max().item(),
        "loss": (output.loss - expected).abs().item(),
        "tuple": len(model(tokens, return_dict=False)),
        "no_cache": model(tokens, use_cache=False).past_key_values is None,
    }


def refusals(model, tokens):
    from transformers import DynamicCache

    short = {"max_new_tokens": 3, "do_sample": False}
    returned = {"return_dict_in_generate": True, **short}
    return {
        "assisted": refusal(lambda: model.generate(tokens[:1], assistant_model=model, **short)),
        "static": refusal(lambda: model.generate(tokens[:1], cache_implementation="static", **short)),
        "foreign_cache": refusal(lambda: model(tokens, past_key_values=DynamicCache())),
        "crop": refusal(lambda: model(tokens).past_key_values.crop(3)),
        "mask": refusal(lambda: model(tokens, attention_mask=torch.ones(2, 1, 3, 3))),
        "rows": refusal(lambda: model(tokens[:1], past_key_values=model(tokens).past_key_values)),
        "empty": refusal(lambda: model(tokens[:, :0])),
        "nothing": refusal(lambda: model()),
        "flat": refusal(lambda: model(tokens[0])),
        "attentions": refusal(lambda: model(tokens, output_attentions=True)),
        "attentions_not_asked": refusal(lambda: model(tokens, output_attentions=False, output_hidden_states=None)),
        "hidden_states": refusal(lambda: model.generate(tokens, output_hidden_states=True, **returned)),
        "embeddings": refusal(lambda: model(inputs_embeds=model.embedding(tokens))),
        "embeddings_generate": refusal(lambda: model.generate(inputs_embeds=model.embedding(tokens), **short)),
        "unknown": refusal(lambda: model(tokens, colour="blue")),
        "read_already": refusal(lambda: model.generate(tokens, past_key_values=model(tokens).past_key_values, **short)),
        "read_already_in_parts": refusal(
            lambda: model.generate(tokens, past_key_values=model(tokens).past_key_values, prefill_chunk_size=3, **short)
        ),
    }


def main(report, folders):
    found = {}
    generator = torch.Generator().manual_seed(0)
    for folder in folders:
        # without leave to run code: the tokenizer needs none
        model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        window = model.config.window_tokens
        tokens = torch.randint(0, 256, (2, 5 * window + 3), generator=torch.Generator().manual_seed(1))
        tokens[:, 0] = model.config.bos_token_id
        with torch.no_grad():
            whole = model(tokens).logits
            found[folder] = {
                "tokens": tokens.tolist(),
                "logits": whole.tolist(),
                "splits": {
                    name: (in_parts(model, tokens, sizes) - whole).abs().max().item()
                    for name, sizes in split_sizes(tokens.shape[1], window, generator).items()
                },
                "generation": generation(model, tokens),
                "right_padded": right_padded(model, tokens),
                "going_on": going_on(model, tokens),
                "bf16": in_bf16(folder, tokens),
                "padding": padding_differences(model, tokens, whole),
                "cache": cache_facts(model, tokens, whole),
                "refusals": refusals(model, tokens),
                "tokenizer": {text: tokenizer(text)["input_ids"] for text in ("In the beginning", "é😀<|eos|>\n")},
            }
    found["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "longspan")
    with open(report, "w") as file:
        json.dump(found, file)


main(sys.argv[1], sys.argv[2:])
