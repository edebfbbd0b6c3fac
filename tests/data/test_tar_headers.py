"""The headers are read as `tarfile` reads them, and what is broken is refused."""

import io
import random
import tarfile

import pytest

from dpcap.data import tar_headers
from dpcap.data.tar_headers import TarDamage, iterate_files

_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_KINDS = (
  *[tarfile.REGTYPE] * 6,
  tarfile.AREGTYPE,
  tarfile.CONTTYPE,
  tarfile.DIRTYPE,
  tarfile.LNKTYPE,
  tarfile.SYMTYPE,
  tarfile.FIFOTYPE,
  tarfile.CHRTYPE,
)


def files(content: bytes) -> list[tuple[str, int, int]]:
  return list(iterate_files(lambda start, stop: content[start:stop], len(content)))


def as_tarfile_reads(content: bytes) -> list[tuple[str, int, int]]:
  # Behind an end marker too: archives may lie one behind the other.
  found, places = [], {}
  with tarfile.open(fileobj=io.BytesIO(content), ignore_zeros=True) as tar:
    for member in tar:
      if member.isreg():
        places[member.name] = member.offset_data, member.size
      elif member.islnk():
        places[member.name] = places.get(member.linkname, (member.offset_data, 0))
      else:
        continue
      found.append((member.name, *places[member.name]))
  return found


def random_name(rng: random.Random, format: int) -> str:
  """Short and long, with folders, dots and letters of any alphabet; ustar holds less."""
  letters = 'abc.0_ ' if format == tarfile.USTAR_FORMAT else 'abc.0_ é犬🐶'
  part = lambda most: ''.join(rng.choices(letters, k=rng.randint(1, most))) + 'x'
  longest = 60 if format == tarfile.USTAR_FORMAT else 300
  return '/'.join([part(40) for _ in range(rng.randint(0, 3))] + [part(longest)])


def random_archive(rng: random.Random, format: int) -> bytes:
  out = io.BytesIO()
  options = {'pax_headers': {'comment': 'made up'}} if format == tarfile.PAX_FORMAT else {}
  with tarfile.open(fileobj=out, mode='w', format=format, **options) as tar:
    # A global pax header with no member behind it is an error to tarfile, and none to us.
    names = []
    for _ in range(rng.randint(format == tarfile.PAX_FORMAT, 30)):
      info = tarfile.TarInfo(random_name(rng, format))
      info.type = rng.choice(_KINDS)
      if info.type == tarfile.AREGTYPE and len(info.name.encode()) > 99:
        info.type = tarfile.REGTYPE  # a long name cut behind a slash looks like a folder to tarfile
      info.mtime = rng.choice([0, 1e9, 1.5e9 + rng.random()])  # a fraction takes a pax header
      if format == tarfile.USTAR_FORMAT:
        info.mtime = int(info.mtime)
      elif rng.random() < 0.2:
        info.uname, info.uid = 'ü' * 40, 2**40  # GNU writes such numbers in binary
      if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        # To a file before, of a name of any length, or to none.
        names.append(random_name(rng, format)[: 90 if format == tarfile.USTAR_FORMAT else None])
        info.linkname = rng.choice(names)
      data = b''
      if info.isreg():
        data = rng.randbytes(rng.choice([0, 1, 511, 512, 513, rng.randint(0, 20_000)]))
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
      if format != tarfile.USTAR_FORMAT or len(info.name) < 90:
        names.append(info.name)
  return out.getvalue()


@pytest.mark.parametrize('seed', range(40))
@pytest.mark.parametrize('format', _FORMATS)
def test_random_archives_are_read_as_tarfile_reads_them(seed, format):
  rng = random.Random(seed)
  content = random_archive(rng, format)
  if seed % 3 == 0:
    content += random_archive(rng, rng.choice(_FORMATS))
  if seed % 4 == 0:
    content += bytes(rng.randint(0, 3 * 2**20))
  expected = as_tarfile_reads(content) if content.strip(b'\0') else []
  assert files(content) == expected


def test_reads_headers_not_data():
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode='w') as tar:
    for i in range(20):
      info = tarfile.TarInfo(f'{i}.jpg')
      info.size = 2**17
      tar.addfile(info, io.BytesIO(bytes([i + 1]) * info.size))
  content, asked = content.getvalue(), []
  read = lambda start, stop: asked.append(stop - start) or content[start:stop]
  assert len(list(iterate_files(read, len(content)))) == 20
  assert sum(asked) < 0.1 * len(content) and len(asked) <= 22


def test_a_pax_size_counts():
  """For files of 8 GB and more the header itself holds none."""
  info = tarfile.TarInfo('big.bin')
  info.size = 1500
  header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
  header[124:136] = b'00000000000\0'
  header[148:156] = b'%06o\0 ' % (sum(header) - sum(header[148:156]) + 256)
  records = b'13 size=1500\n'
  extended = tarfile.TarInfo('pax')
  extended.type, extended.size = tarfile.XHDTYPE, len(records)
  content = extended.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b'\0')
  content += bytes(header) + bytes(1536) + tarfile.TarInfo('after').tobuf() + bytes(1024)
  assert (
    files(content) == as_tarfile_reads(content) == [('big.bin', 1536, 1500), ('after', 3584, 0)]
  )


def _with_pax(**records) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as tar:
    info = tarfile.TarInfo('sparse.jpg')
    info.pax_headers = records
    tar.addfile(info)
  return out.getvalue()


def _gnu_sparse() -> bytes:
  info = tarfile.TarInfo('sparse.jpg')
  info.type = tarfile.GNUTYPE_SPARSE
  return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def _signed_sum() -> bytes:
  header = bytearray(tarfile.TarInfo('é.jpg').tobuf(tarfile.USTAR_FORMAT, 'utf-8'))
  signed = tarfile.calc_chksums(header)[1]
  header[148:156] = b'%06o\0 ' % signed
  return bytes(header) + bytes(1024)


def test_sums_of_signed_characters_are_valid():
  content = _signed_sum()
  assert files(content) == as_tarfile_reads(content) == [('é.jpg', 512, 0)]


@pytest.mark.parametrize(
  'content, reason',
  [
    (_gnu_sparse(), 'sparse.jpg at byte 0 is sparse'),
    (_with_pax(**{'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'}), 'is sparse'),
    (_with_pax(path='犬').replace('path=犬'.encode(), b'size=abc'), 'no valid pax record'),
    (_with_pax(path='犬').replace(b'12 path', b'99 path'), 'no valid pax record'),
    (_with_pax(comment='犬')[:1100], 'truncated: its 1100 bytes end inside a header'),
    (b'\x1f\x8b' + bytes(range(256)) * 4, 'damaged at byte 0'),
    (bytes(512) + b'x' * 512, 'damaged at byte 512'),
    (bytes(512) + b'x' * 10, 'inside a header'),
  ],
)
def test_what_cannot_be_read_is_refused(content, reason):
  with pytest.raises(TarDamage, match=reason):
    files(content)


def test_any_damaged_byte_of_a_header_is_noticed():
  content = random_archive(random.Random(1), tarfile.GNU_FORMAT)
  _, data, _ = files(content)[0]
  for at in range(data - tar_headers.BLOCK, data):
    damaged = bytearray(content)
    damaged[at] ^= 1
    # Letters of the sum's own field may change without meaning another number: 0 and space.
    if at - data + tar_headers.BLOCK not in range(148, 156):
      with pytest.raises(TarDamage):
        files(bytes(damaged))


def test_an_old_folder_is_no_file():
  """Before POSIX only the slash told."""
  folder = tarfile.TarInfo('folder/')
  folder.type = tarfile.AREGTYPE
  content = folder.tobuf(tarfile.USTAR_FORMAT) + tarfile.TarInfo('x').tobuf() + bytes(1024)
  assert files(content) == as_tarfile_reads(content) == [('x', 1024, 0)]
