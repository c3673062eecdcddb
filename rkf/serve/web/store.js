// Keeps conversations in the browser, one entry of localStorage each. Nothing of them is kept on the server.

const PREFIX = "rkf.conversation.";
const SETTINGS = "rkf.settings";
const THEME = "rkf.theme";

function parsed(text, fallback) {
  try {
    return JSON.parse(text) ?? fallback;
  } catch {
    return fallback; // written by another version of the page, or by hand
  }
}

/** All conversations, the latest first. */
export function loadConversations() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => parsed(localStorage.getItem(name), null))
    .filter((conversation) => Array.isArray(conversation?.messages))
    .sort((a, b) => b.changed - a.changed);
}

/** Throws QuotaExceededError when the browser's space is used up. */
export function saveConversation(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export const deleteConversation = (id) => localStorage.removeItem(PREFIX + id);

export const newConversation = () => ({
  id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // randomUUID is missing on plain HTTP to other hosts
  title: "New chat",
  changed: Date.now(),
  messages: [],
});

export const loadSettings = () => parsed(localStorage.getItem(SETTINGS), {});
export const saveSettings = (settings) => localStorage.setItem(SETTINGS, JSON.stringify(settings));

export const loadTheme = () => localStorage.getItem(THEME) ?? "auto";
export const saveTheme = (theme) => localStorage.setItem(THEME, theme);
