"""Choose Debian packages by family from apt-cache dumpavail -> debian.tsv (family, package, version, source, size, homepage)."""
import os
import re, gzip, json, glob
P=dict(ruby=r'^ruby-|^(yard|bundler|jekyll|rake|puppet-agent|vagrant|asciidoctor|ruby-bundler)$',go=r'^golang-.*-dev$',node=r'^node-|^libjs-(three|openlayers|leaflet|codemirror|sizzle|d3|mathjax)|^(eslint|webpack|npm|gulp|mocha|jsdoc-toolkit)$',php=r'^php-|^phpunit$|^(phpmyadmin|mediawiki|wordpress|dokuwiki|roundcube-core|cacti|icingaweb2|nextcloud)$',rust=r'^librust-.*-dev$',lua='^lua-')
MIN=dict(ruby=7000,go=9000,node=6000,php=6000,rust=18000,lua=4000)
csn=set()
for f in glob.glob(os.environ['MOSE_DATA'] + '/codesearchnet/*.gz'):
    for l in gzip.open(f,'rt'): csn.add(json.loads(l)['repository_name'].lower())
semble=set(l.split('\t')[2].removeprefix('github:').lower() for l in open(os.environ['MOSE_DATA'] + '/semble/repos.tsv').read().splitlines()[1:])
more={x.lower() for x in open('semble_more.txt').read().split()}
names={w for l in open('exclude_names.txt') if l[0]!='#' for w in l.split()}
ban=csn|semble|more
skip=re.compile(r'libghc|-doc$|-dbg|all-dev$|^php-(?!.*)|golang-go\.|-dbgsym')
seen=set(); out=[]; banned=[]
for para in open('avail.txt').read().split('\n\n'):
    d=dict(re.findall(r'^([\w-]+): ?(.*)$',para,re.M))
    p=d.get('Package','')
    if p in seen or not p: continue
    for k,r in P.items():
        if re.match(r,p): break
    else: continue
    seen.add(p)
    home=d.get('Homepage','').lower().removesuffix('.git').rstrip('/')
    m=re.search(r'github\.com/([^/]+/[^/#]+)',home)
    repo=m.group(1) if m else ''
    base=re.sub(r'^(ruby|node|php|golang-github|lua|libjs)-','',p).removesuffix('-dev')
    src=d.get('Source',p).split()[0]
    hit = repo in ban or p in names or src in names or any(base==b.replace('/','-').replace('_','-').replace('.','-') for b in ban) or any(k in('ruby','node','php','lua') and base==b.split('/')[-1].replace('_','-') for b in ban)
    if hit: banned.append((p,repo)); continue
    s=int(d['Size'])
    if s<MIN[k] or s>45e6 or skip.search(p): continue
    out.append((k,p,d['Version'],d.get('Source',p).split()[0],s,home))
# one binary per source for rust feature packages and for equal go sources
open('debian.tsv','w').write('\n'.join('\t'.join(map(str,x)) for x in out)+'\n')
open('excluded_debian.tsv','w').write('\n'.join('\t'.join(x) for x in banned)+'\n')
import collections
n=collections.Counter(); z=collections.Counter()
for x in out: n[x[0]]+=1; z[x[0]]+=x[4]
print(n, {k:v/1e6 for k,v in z.items()}); print(banned)
