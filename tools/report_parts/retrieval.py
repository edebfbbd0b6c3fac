"""Images and what was found to be like them."""

import html
from typing import Any

import ml_collections

from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from tools.report_parts import captions, probes


def section(config: ml_collections.ConfigDict, record: dict[str, Any]) -> str:
  """HTML of an evaluation by retrieval; without images if its source cannot be read."""
  try:
    view = captions.make_view(config, record)
    picture = lambda number: captions.picture(view(number))
    rows = ''.join(_row(example, picture) for example in record['examples'])
  except (UserError, OSError, BadRecord, LookupError, TypeError) as e:
    rows = f'<p class="absent">Without images: {html.escape(str(e))}.</p>'
  recall = ', '.join(
    f'{entry["value"]:.1%} among the first {html.escape(k)}'
    for k, entry in record['recall'].items()
  )
  return (
    f'<section><h2>{html.escape(probes.title(record).capitalize())}</h2><p class="about">An image'
    f' and, beside it, the ones whose features are most like its own. Framed: of the same class. One'
    f' of the same class is found for {recall}; mean average precision'
    f' {record["mean_average_precision"]:.1%}; {record["n"]:,} images.</p>'
    f'<div class="retrieval">{rows}</div></section>'
  )


def _row(example: dict[str, Any], picture) -> str:
  found = ''.join(
    f'<span class="{"same" if same else "other"}">{picture(number)}</span>'
    for number, same in zip(example['nearest'], example['same_class'])
  )
  return f'<div>{picture(example["query"])}<i></i>{found}</div>'
