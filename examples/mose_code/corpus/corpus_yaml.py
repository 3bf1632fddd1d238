"""Write corpus.yaml: every package whose rows were used or read and permitted, with version and licence."""
import gzip, glob, json, re, yaml
version = {}
for l in open('debian.tsv'): x = l.split('\t'); version[x[1]] = x[2]
npm = {n.lstrip('@').replace('/', '-'): (n, v) for n, v in (l.rstrip('\n').split('\t') for l in open('npm.tsv'))}
pypi = {re.sub(r'[-.]', '_', n).lower(): (n, v) for n, v in (l.rstrip('\n').split('\t') for l in open('pypi.tsv'))}
source = {l.split('\t')[0]: l.split('\t')[1] for l in open('source.tsv')}
out = {k: [] for k in ('debian', 'npm', 'pypi', 'source')}; left = []
for f in sorted(glob.glob('extracted/*/*.gz')):
    h = json.loads(next(gzip.open(f, 'rt'))); kind, name = h['kind'], h['package'].split(':', 1)[1]
    if not h.get('permitted'): left.append({'registry': kind, 'name': name, 'licence': h.get('licence', ''), **({'evaluation_repository': h['banned']} if h.get('banned') else {})}); continue
    if not h['pairs'] and not h['texts']: continue
    if kind == 'debian': name, v = name, version.get(name) or h['file'].split('_')[1].replace('%3a', ':')
    elif kind == 'npm': name, v = npm.get(name, (name, ''))
    elif kind == 'pypi': name, v = pypi.get(name.lower(), (name, h['file'].split('-')[1]))
    else: v = source.get(name, '')
    out[kind].append({'name': name, 'version': v, 'licence': h['licence'][:120], 'pairs_read': h['pairs'], **({'licence_from': h['licence_from']} if h.get('licence_from') else {})})
head = '# Packages of the mose-code corpus, by registry. licence: as the package states it (debian/copyright, package.json, METADATA).\n# pairs_read: documented functions found in it, before decontamination, de-duplication and caps.\n'
open('corpus.yaml', 'w').write(head + yaml.safe_dump({'distribution': 'Debian 12 (bookworm), 2026-11', 'packages': out, 'left_out': left}, sort_keys=False, width=200))
print({k: len(v) for k, v in out.items()}, len(left), [p for v in out.values() for p in v if not p['version']][:10])
