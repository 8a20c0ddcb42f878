// Runs before the first paint, so that a page that was set to dark does not flash. The one script that is no module.
// What is remembered is the look and the language, never a key or a text.
try {
  const theme = localStorage.getItem("playground.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the system's preference counts.
}
