"""A look at a few records: where they are, and what makes one unusable."""

import io

import numpy as np
from PIL import Image

from dpcap.data.first_look import RECORDS, FirstLook, look_at
from dpcap.data.source import BadRecord, Record

FIELDS = ('image', 'tokens')


def png() -> bytes:
  file = io.BytesIO()
  Image.new('RGB', (4, 4)).save(file, 'PNG')
  return file.getvalue()


class Made:
  """Records by a function of the index."""

  def __init__(self, size, make):
    self.size, self.make, self.seen = size, make, []

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    self.seen.append(index)
    return self.make(index)


def record(image=b'', caption=b'a dog') -> Record:
  return Record(image=image or png(), caption=caption, label=-1)


def test_records_at_equal_distances():
  source = Made(1_000_000, lambda i: record())
  assert look_at(source, FIELDS) == FirstLook(RECORDS, RECORDS, ())
  assert source.seen[0] == 0 and set(np.diff(source.seen)) == {15625}
  few = Made(3, lambda i: record())
  assert look_at(few, FIELDS) == FirstLook(3, 3, ()) and few.seen == [0, 1, 2]


def test_the_commonest_reasons_are_told():
  def make(index):
    if index < 10:
      return record(caption=None)
    if index < 16:
      return record(image=b'<html>403 Forbidden</html>')
    if index < 20:
      raise BadRecord('json member is damaged')
    if index == 20:
      return record(caption=['', 'another'])
    return record(caption=['one', 'another'])

  look = look_at(Made(50, make), FIELDS)
  assert (look.looked_at, look.usable) == (50, 29)
  assert look.reasons[0] == 'no caption (10)' and look.reasons[2] == 'json member is damaged (4)'
  assert look.reasons[1].startswith('not an image of a known format') and '(6)' in look.reasons[1]


def test_labels_are_looked_at_where_they_are_asked_for():
  labelled = Made(6, lambda i: Record(image=png(), caption=None, label=i // 4))
  assert look_at(labelled, ('image', 'label')) == FirstLook(6, 6, ())
  without = Made(6, lambda i: record())
  assert look_at(without, ('image', 'label')) == FirstLook(6, 0, ('no label (6)',))
  assert look_at(without, ('image', 'key')) == FirstLook(6, 6, ())
