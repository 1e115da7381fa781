"""What a run would do, without loading weights or writing anything."""

from __future__ import annotations

import itertools

from rollout_engine.batch.job import Job
from rollout_engine.batch.output import Output
from rollout_engine.config import EngineConfig

SHOWN = 3  # prompts
SHOWN_CHARACTERS = 2000
GIB = 1 << 30


def plan(job: Job, output: str, *, data_parallel: int = 1) -> str:
    """Model, input, first prompts as the model reads them, KV cache, what is done. Raises ValueError as a run does."""
    from rollout_engine import chat
    from rollout_engine.models import family
    from rollout_engine.models.checkpoint import DTYPES, load_hf_config, load_tokenizer, resolve

    target = Output(output, job.params.n)
    target.check(job.settings())
    folder = resolve(job.model, job.revision)
    decoder = family(load_hf_config(folder)).decoder_config(load_hf_config(folder))
    tokenizer = load_tokenizer(folder)
    engine = EngineConfig(**job.engine, numerics=job.numerics)
    kv_tokens = int(engine.kv_cache_gib * GIB) // decoder.kv_bytes_per_token(DTYPES[job.dtype].itemsize)
    done = target.done(job.source.rows())
    count = job.source.count()
    lines = [
        f"model     {job.model}, {job.dtype}, context {decoder.max_position}, numerics {job.numerics}",
        f"input     {job.source.path}, {'streamed' if count is None else f'{count:,} rows'}"
        f"{'' if job.limit is None else f', of these the first {job.limit:,}'}",
        f"answers   {job.params.n} for each row, at most {job.params.max_tokens} tokens, "
        f"temperature {job.params.temperature:g}",
        f"kv cache  {engine.kv_cache_gib:g} GiB = {kv_tokens:,} tokens in pages of {engine.page_size}, at most "
        f"{engine.max_num_seqs} answers at once, in {data_parallel} process{'es' * (data_parallel > 1)}",
        f"output    {output}: {done.rows:,} rows done, {done.failed:,} of them failed",
    ]
    for row in itertools.islice(job.source.rows(), SHOWN):
        try:
            prompt = job.form.prompt(row, tokenizer)
            ids = prompt.get("prompt_token_ids") or chat.encode(tokenizer, prompt["prompt"])
            lines.append(f"row {row.id}: {len(ids)} tokens\n{tokenizer.decode(ids):.{SHOWN_CHARACTERS}}")
        except ValueError as error:
            lines.append(f"row {row.id}: fails, {error}")
    return "\n".join(lines)
