"""One module for each format. Every module has the same three functions:

- `shards(options) -> list[Shard]`: the units of work, in the order of precedence; a UserError says which option is
  wrong.
- `scan(shard, options) -> Iterator[Claim]`: which ids the records of a shard claim; empty where ids cannot clash.
- `read(shard, options, losers=NO_LOSERS) -> Iterator[Document | Problem]`: the documents of a shard but for those
  records that lost their id to another one.

`options` is a mapping: `path`, and what the module's Options class lists. `meditron_train.corpus.record_claims`
turns the claims of all shards into the losers of each. All three stream: their memory does not grow with the
files.
"""
