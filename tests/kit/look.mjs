// Opens pages in chromium, does there what a person would, and tells, as JSON on stdout, what went wrong and what is in them.
// Arguments: playwright-core's folder, chromium's path, a fresh profile folder, and JSON:
// [{url, width, height, dark, steps: [step, ...], ask: {name: expression}, picture: path or null}, ...]
// A step is {wait: expression that becomes true}, {key: "ArrowDown"}, {type: text}, {click: css or [x, y]}, {drag: [css, x, y]},
// {focus: css}, {ask: name, of: expression} or {picture: path}.
import { createRequire } from "node:module";

const [driver, executablePath, profile, looks] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(driver);
const args = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const context = await chromium.launchPersistentContext(profile, { executablePath, args, headless: true });

// Playwright's own waiting evaluates text inside the page, which a strict page forbids.
async function until(page, expression) {
  for (const end = Date.now() + 20000; !(await page.evaluate(expression)); await page.waitForTimeout(30)) {
    if (Date.now() > end) throw new Error("it did not become true in 20 s");
  }
}

async function take(page, step, answers) {
  if (step.wait) await until(page, step.wait);
  if (step.key) await page.keyboard.press(step.key);
  if (step.type) await page.keyboard.type(step.type);
  if (step.focus) await page.focus(step.focus);
  if (typeof step.click === "string") await page.click(step.click);
  if (Array.isArray(step.click)) await page.mouse.click(...step.click);
  if (step.drag) {
    const [css, x, y] = step.drag;
    const box = await page.locator(css).boundingBox();
    await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
    await page.mouse.down();
    await page.mouse.move(x, y, { steps: 5 });
    await page.mouse.up();
  }
  if (step.ask) answers[step.ask] = await page.evaluate(step.of);
  if (step.picture) await page.screenshot({ path: step.picture });
}

const told = [];
for (const look of JSON.parse(looks)) {
  const page = await context.newPage();
  const trouble = [];
  const requests = [];
  const ranges = [];
  page.on("console", (message) => trouble.push(`console ${message.type()}: ${message.text()} (${message.location().url}:${message.location().lineNumber})`));
  page.on("pageerror", (error) => trouble.push(`page error: ${error.message}`));
  page.on("requestfailed", (request) => trouble.push(`request failed: ${request.url().slice(0, 200)}`));
  page.on("response", (response) => response.status() >= 400 && trouble.push(`${response.status()}: ${response.url()}`));
  page.on("request", (request) => request.url().startsWith("data:") || requests.push(request.url()));
  page.on("response", (response) => response.status() === 206 && ranges.push([response.url(), response.headers()["content-range"]]));
  await page.setViewportSize({ width: look.width, height: look.height });
  await page.emulateMedia({ colorScheme: look.dark ? "dark" : "light" });
  await page.goto(look.url, { waitUntil: "load" });
  const answers = {};
  let at = 0;
  try {
    for (const step of look.steps) {
      await take(page, step, answers);
      at += 1;
    }
  } catch (error) {
    trouble.push(`step ${at} ${JSON.stringify(look.steps[at])}: ${error.message}`);
  }
  for (const [name, expression] of Object.entries(look.ask)) answers[name] = await page.evaluate(expression);
  if (look.picture) await page.screenshot({ path: look.picture, fullPage: true });
  told.push({ trouble, requests, ranges, answers });
  await page.close();
}
await context.close();
console.log(JSON.stringify(told));
