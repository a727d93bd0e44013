"use strict";
// What differs between two answers, word by word.

const LONGEST = 1500; // words: the table of a comparison has their product

// Words of scripts without spaces too; an older browser splits at spaces alone.
const segmenter = Intl.Segmenter ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
const wordsOf = (text) => (segmenter ? Array.from(segmenter.segment(text), (part) => part.segment) : text.match(/\s+|\S+/g) || []);

/** [["same" | "new" | "gone", text], …], or null if the texts are too long. By the longest common subsequence. */
function difference(before, after) {
  const a = wordsOf(before);
  const b = wordsOf(after);
  if (a.length > LONGEST || b.length > LONGEST) return null;
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width); // of a[i…] and b[j…]
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const skip = Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1 : skip;
    }
  }
  const parts = [];
  const add = (kind, word) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === kind) last[1] += word;
    else parts.push([kind, word]);
  };
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add("same", a[i]);
      i += 1;
      j += 1;
    } else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      add("gone", a[i]);
      i += 1;
    } else {
      add("new", b[j]);
      j += 1;
    }
  }
  return parts;
}
