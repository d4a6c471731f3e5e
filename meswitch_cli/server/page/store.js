// Chats, kept in this browser alone (IndexedDB). Where it has none, they last as long as the page.

let opened = null;
const here = new Map();

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("meswitch", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, work) {
  const transaction = (await database()).transaction("chats", mode);
  const request = work(transaction.objectStore("chats"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

// Every chat, the newest first.
export async function all() {
  let chats;
  try {
    chats = await run("readonly", (store) => store.getAll());
  } catch {
    chats = [...here.values()];
  }
  return chats.sort((one, other) => other.updated - one.updated);
}

export async function save(chat) {
  try {
    await run("readwrite", (store) => store.put(chat));
  } catch {
    here.set(chat.id, structuredClone(chat));
  }
}

export async function remove(id) {
  here.delete(id);
  await run("readwrite", (store) => store.delete(id)).catch(() => null);
}

export async function clear() {
  here.clear();
  await run("readwrite", (store) => store.clear()).catch(() => null);
}
