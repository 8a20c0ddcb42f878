// What outlives a reload: the theme and the language, where the browser keeps anything. Keys and texts never come here.

export function recall(name) {
  try {
    return localStorage.getItem(`playground.${name}`);
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    if (value) localStorage.setItem(`playground.${name}`, value);
    else localStorage.removeItem(`playground.${name}`);
  } catch {
    // Storage is switched off.
  }
}
