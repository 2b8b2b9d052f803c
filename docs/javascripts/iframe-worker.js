// Search in pages that are opened from a folder. Browsers refuse a Worker there, so its script runs in a hidden frame.
// The theme's plugin `offline` asks for a script of this name (mkdocs.yml), and would fetch one from the network.
if (location.protocol === "file:") {
  const deliver = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }))

  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.document.open()
      this.inside.document.write(`<script src="${new URL(url, location)}"><\/script>`)
      this.inside.document.close()
      this.ready = new Promise(done => this.inside.addEventListener("load", done))  // after open(), which drops listeners
      this.inside.postMessage = data => setTimeout(deliver, 0, this, data)
    }

    postMessage(data) {
      this.ready.then(() => deliver(this.inside, data))
    }
  }
}
