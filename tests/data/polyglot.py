"""One source text for each language, with what makes spans hard: other alphabets, tabs, decorators, nesting, heredocs.

`⟦` and `⟧` enclose every function to find; `marked` removes them and returns where they were.
"""

PYTHON = '''\
# Größe: 10 µm \N{SNOWMAN}
class Ähre:
\t⟦@cache(
\t\tsize="é")
\tdef wächst(self, größe="ü"):
\t\t"""Return the size after growing.

\t\tMore.
\t\t"""
\t\t⟦def inner():
\t\t\treturn """ä
\t\tkept
"""⟧
\t\treturn inner()⟧  # trailing


⟦async def läuft():
    "Run to the end of it."
    return 1⟧
'''

JAVA = '''\
package a;
/** The class, not the method. */
public class Größe<T> extends B {
\t/**
\t * Returns the <b>size</b> of {@code ä}.
\t *
\t * @param a not this
\t */
\t⟦@Override("é")
\tpublic <T> List<T> größe(int a) throws E {
\t\tString s = """
\t\t  ü
\t\t  """; return null;
\t}⟧
\tabstract void none();
\t⟦Größe() { super(); }⟧
\tenum E { X { ⟦void f() { return; }⟧ }; ⟦void g() {}⟧ }
\tinterface I { ⟦default void d() { }⟧ void n(); }
\trecord R(int a) { ⟦R { a = 1; }⟧ }
}
'''

GO = """\
package größe // ä

// Push puts é on top
// of the stack.
//
// More.
//go:noinline
⟦func (s *Stack[T]) Push(é T) error {
\tx := `ü
\tkept`
\treturn nil
}⟧

/* F is documented by a block. */
⟦func F[T any](a T) {}⟧

// unrelated to what follows

⟦func g() { f := func() { return }; f() }⟧
func assembly(x int) int
"""

PHP = """\
<html>é<?php
namespace A\\B;

/**
 * Grows the <code>ähre</code>,
 * see {@see Foo}.
 * @return array
 */
⟦#[Attr("ü")]
function &größe(int $a): array {
    return [<<<EOT
      ä
      EOT];
}⟧
trait T {
\t/** Statically does é. */
\t⟦#[X]
\tpublic static function tut() { return 'a
\t b'; }⟧
\tabstract function none();
}
class C { ⟦function __construct() { ⟦function inner() {}⟧ }⟧ }
enum E { case A; ⟦function l() { return 1; }⟧ }
// Not for users.
⟦function plain() { return 1; }⟧
?><b>ß</b>
"""

RUBY = """\
# Größe
module Größe
  class A::B < C
    # Returns the é of +x+.
    #
    # @param a not this
    private ⟦def wächst(a)
      x = <<~EOS
        ü
    not code
      EOS
      x
    end⟧

=begin
Documented by a block.
=end
    ⟦def self.tut; 1; end⟧
    class << self
      ⟦def qux = 1⟧
    end
    ⟦def ==(o) true end⟧
    x = 1 # belongs to x
    ⟦def plain(v); ⟦def inner; end⟧; end⟧
  end
end
# Reads what follows it.
⟦def heredoc = <<~X
  ä
X⟧
"""

JAVASCRIPT = """\
/** Default é function. */
export default ⟦async function () { return `ä
  kept`; }⟧
/** Adds one to x. */
// eslint-disable-next-line
export ⟦const größe = async (x) => { return x + 1; };⟧
var ⟦a = function () {}⟧, ⟦b = () => 1⟧;
/**
 * @param {number} x
 * @description Pushes onto it.
 */
⟦Foo.prototype.push = function (x) { return ⟦function inner() {}⟧; };⟧
const o = {
\t/** Key of o. */
\t⟦k: function () { return 1; }⟧, ⟦get d() { return "ü"; }⟧, 5: ⟦x => 1⟧,
};
class Ä extends B {
\t/** Method of it. */ ⟦static async *m() { return 1; }⟧
\t⟦#f = (a) => { return a; }⟧
\t⟦constructor() { items.map(function (x) { return x; }); }⟧
}
// Not for users.
⟦function plain() {}⟧
⟦module.exports = function (x) { return x; };⟧
""".replace("5: ⟦x => 1⟧", "⟦5: x => 1⟧")

C = """\
/* é */
#include <stdio.h>
int prototype(int a);

/* Returns the Größe
 * of a string. */
⟦static char **größe(const char *s) {
\treturn "a\\
  b";
}⟧

/// \\brief Adds \\a x to itself.
/// \\param x not this
⟦int
add(int x)
{ return x + x; }⟧
int counter; /* belongs to the counter */
⟦int (*pick(int a))(void) { return 0; }⟧

// Runs on another
// system.
⟦static void WINAPI run(void *data UNUSED) { return; }⟧
REGISTER(größe)
⟦int old(a) int a; { if (a) { return 1; } else { return 0; } }⟧
"""

CPP = """\
// ß
namespace n {
/// Does é for any T.
⟦template <class T> int A<T>::b(int x) const noexcept { return 1; }⟧
⟦A::A(int x) : x_(x) {}⟧
struct B {
\t⟦B() {}⟧ B(B &&) = default; void f() = delete;
\t/*! Converts ä to a truth value. */
\t⟦operator bool() const { return true; }⟧
\t⟦bool operator==(const B& o) { return R"(
\tkept)"; }⟧
\t⟦int &r() { return x; }⟧
};
class EXPORT Größe : public Bar { ⟦void m() { x(); }⟧ };
TEST_F(A, b) { int x; }
extern "C" ⟦void h() {}⟧
⟦template <> template <class U> void A<int>::g<U>(U u) { auto f = [](int x) { return x; }; }⟧
}
"""

MARKED = {"python": PYTHON, "java": JAVA, "go": GO, "php": PHP}
MARKED |= {"ruby": RUBY, "javascript": JAVASCRIPT, "c": C, "cpp": CPP}

# Language → name → description of every function.
NAMES = {
    "python": {
        "Ähre.wächst": "Return the size after growing.",
        "läuft": "Run to the end of it.",
        "Ähre.wächst.inner": "",
    },
    "java": {
        "Größe.größe": "Returns the size of ä.",
        **dict.fromkeys(["Größe.Größe", "Größe.E.f", "Größe.E.g", "Größe.I.d", "Größe.R.R"], ""),
    },
    "go": {"Stack.Push": "Push puts é on top of the stack.", "F": "F is documented by a block.", "g": ""},
    "php": {
        "größe": "Grows the ähre, see Foo.",
        "T.tut": "Statically does é.",
        **dict.fromkeys(["C.__construct", "C.__construct.inner", "E.l", "plain"], ""),
    },
    "ruby": {
        "Größe.A.B.wächst": "Returns the é of x.",
        "Größe.A.B.tut": "Documented by a block.",
        "heredoc": "Reads what follows it.",
        **dict.fromkeys(["Größe.A.B.qux", "Größe.A.B.==", "Größe.A.B.plain", "Größe.A.B.plain.inner"], ""),
    },
    "javascript": {
        "default": "Default é function.",
        "größe": "Adds one to x.",
        "Foo.push": "Pushes onto it.",
        "o.k": "Key of o.",
        "Ä.m": "Method of it.",
        **dict.fromkeys(["a", "b", "Foo.push.inner", "o.d", "o.5", "Ä.#f", "Ä.constructor", "plain", "exports"], ""),
    },
    "c": {
        "größe": "Returns the Größe of a string.",
        "add": "Adds x to itself.",
        "run": "Runs on another system.",
        **dict.fromkeys(["pick", "old"], ""),
    },
    "cpp": {
        "A.b": "Does é for any T.",
        "B.operator bool": "Converts ä to a truth value.",
        **dict.fromkeys(["A.A", "B.B", "B.operator==", "B.r", "Größe.m", "h", "A.g"], ""),
    },
}


def marked(text):
    """Return (text without marks, [(first byte, byte after the last)] in the order of the first bytes)."""
    plain, spans, opened = "", [], []
    for character in text:
        if character == "⟦":
            opened.append(len(spans))
            spans.append([len(plain.encode()), None])
        elif character == "⟧":
            spans[opened.pop()][1] = len(plain.encode())
        else:
            plain += character
    return plain, [tuple(span) for span in spans]


SOURCES = {language: marked(text)[0] for language, text in MARKED.items()}
